"""Code shared by the training scripts: one training loop based on Accelerate, and its helpers.

Read `loop.py` first. The other files hold the code that it and the scripts call: `arguments.py` (the options),
`optim.py` (AdamW and the learning rate), `memory.py` (keeps freed memory in the process), `models.py` (configurations,
weights and tokenizers), `checkpoints.py` (the files of a run and how they are written), `hub.py` (uploads), `plots.py`
and `model_card.py` (figures and README.md), `video.py` (code shared by the video scripts).
Requires the extra `train`: in a clone, `pip install -e ".[train]"`.
"""

import importlib.util

_missing = [name for name in ("accelerate", "datasets") if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(f"training needs {' and '.join(_missing)}: pip install {' '.join(_missing)}")
