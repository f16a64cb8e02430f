"""NVIDIA GPUs: which one there is, how ONNX Runtime uses it, and host memory that it reads at full speed.

The driver and the CUDA runtime are called through ctypes: both are there wherever ONNX Runtime runs on a GPU.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CUDA", "CUDA_OPTIONS", "PROCESSOR", "TENSORRT", "Gpu", "InputBuffers", "find_gpu", "load_cuda_runtime"]

CUDA, TENSORRT, PROCESSOR = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
"""The providers of ONNX Runtime."""

CUDA_OPTIONS = {
    # By default fp32 networks run in TF32, whose numbers have the 10 bits of fp16.
    "use_tf32": "0",
    # The default tries all algorithms for each new batch size: slow for a server, and two runs may choose differently.
    "cudnn_conv_algo_search": "HEURISTIC",
}
"""Of ONNX Runtime's CUDA provider.

Source: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#configuration-options
"""

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: such as `NVIDIA H200`.
        capability: of its generation, such as `9.0`.
    """

    name: str
    capability: str


def find_gpu() -> Gpu | None:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves visible; None where no driver or no GPU answers."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    name, number = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(number), 0):
        return None
    if driver.cuDeviceGetName(name, _NAME_BYTES, number):
        return None
    parts = []
    for attribute in (_MAJOR, _MINOR):
        part = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, number)
        parts.append(str(part.value))
    return Gpu(name.value.decode(errors="replace"), ".".join(parts))


def load_cuda_runtime() -> Any:
    """The CUDA runtime that ONNX Runtime has loaded, or None."""
    for name in ("libcudart.so.13", "libcudart.so.12"):
        with suppress(OSError):
            return ctypes.CDLL(name)
    return None


class InputBuffers:
    """Arrays for batches, one for each thread, in memory that the system keeps in its place (pinned).

    A GPU reads such memory by itself, while the processor prepares the next batch. From other memory the driver copies
    piece by piece.

    Args:
        runtime: see `load_cuda_runtime`. Without one, or where it gives no memory, arrays are NumPy's.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._own = threading.local()

    def array(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float32 array with any content. The next call of the same thread gives the same memory again."""
        count = math.prod(shape)
        flat: NDArray[np.float32] | None = getattr(self._own, "flat", None)
        if flat is None or len(flat) < count:
            self._own.flat = flat = self._allocate(count)
        return flat[:count].reshape(shape)

    def _allocate(self, count: int) -> NDArray[np.float32]:
        place = ctypes.c_void_p()
        if self._runtime is None or not count:
            return np.empty(count, np.float32)
        if self._runtime.cudaHostAlloc(ctypes.byref(place), ctypes.c_size_t(4 * count), ctypes.c_uint(0)):
            self._runtime.cudaGetLastError()  # else the next call of ONNX Runtime would find this error
            return np.empty(count, np.float32)
        buffer = (ctypes.c_float * count).from_address(place.value or 0)
        # Freed with the last array that uses it. When the process ends, the driver does so, perhaps before Python.
        weakref.finalize(buffer, self._runtime.cudaFreeHost, place).atexit = False
        return np.ctypeslib.as_array(buffer)
