"""Makes models and measures them: concepts, data, network, HRRL, trainer, export. Needs the extra `train`.

Of export/, only what handles PyTorch networks does: ONNX files are imported without it (`tests/test_layering.py`).
"""

import os

# PyTorch reads it once, before its first tensor. Steps on a CPU make and free gigabytes: in pages of 2 MiB instead of
# 4 KiB they take a tenth less time. Where the system has no such pages, nothing changes.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
