"""What the training scripts share: one Accelerate loop and what surrounds it.

Read `loop.py` first; the other files are what it calls: `arguments.py` (the options), `optim.py` (AdamW and
the learning rate), `memory.py` (what becomes of the memory that a step frees), `checkpoints.py` (what is
written, and how), `plots.py` and `model_card.py` (what a reader sees). Needs the extra `train`:
`pip install "mingru-hf[train]"`.
"""

import importlib.util

for _package in ("accelerate", "datasets"):
    if importlib.util.find_spec(_package) is None:
        raise ImportError(f'training needs {_package}: pip install "mingru-hf[train]"')
