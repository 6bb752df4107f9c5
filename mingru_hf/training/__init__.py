"""What the training scripts share: one Accelerate loop and what surrounds it.

Read `loop.py` first; the other files are what it and the scripts call: `arguments.py` (the options), `optim.py` (AdamW
and the learning rate), `memory.py` (which keeps freed memory in the process), `models.py` (configurations, weights and
tokenizers), `checkpoints.py` (what is written, and how), `hub.py` (uploads), `plots.py` and `model_card.py` (what a
reader sees), `video.py` (what the video scripts share).
Needs the extra `train`: in a clone `pip install -e ".[train]"`.
"""

import importlib.util

_missing = [name for name in ("accelerate", "datasets") if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(f"training needs {' and '.join(_missing)}: pip install {' '.join(_missing)}")
