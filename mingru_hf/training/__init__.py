"""What the training scripts share: one Accelerate loop and what surrounds it.

Read `loop.py` first; the other files are what it calls: `arguments.py` (the options), `optim.py` (AdamW and
the learning rate), `memory.py` (which keeps freed memory in the process), `checkpoints.py` (what is
written, and how), `plots.py` and `model_card.py` (what a reader sees). Needs the extra `train`: in a clone
`pip install -e ".[train]"`.
"""

import importlib.util

_missing = [name for name in ("accelerate", "datasets") if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(f"training needs {' and '.join(_missing)}: pip install {' '.join(_missing)}")
