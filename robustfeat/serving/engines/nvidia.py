"""Finds an NVIDIA GPU, sets ONNX Runtime's options for it, and allocates memory that it reads at full speed.

ctypes calls the driver and the CUDA runtime, which exist wherever ONNX Runtime runs on a GPU.
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
    # By default, fp32 networks run in TF32, whose precision is fp16's 10 bits.
    "use_tf32": "0",
    # The default tries all algorithms for each batch size, which is slow for a server and may differ between runs.
    "cudnn_conv_algo_search": "HEURISTIC",
}
"""Options of ONNX Runtime's CUDA provider.

Source: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#configuration-options
"""

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: the name, such as `NVIDIA H200`.
        capability: the compute capability, such as `9.0`.
    """

    name: str
    capability: str


def find_gpu() -> Gpu | None:
    """The first GPU in CUDA_VISIBLE_DEVICES, or None if no driver or GPU answers."""
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
    """One array per thread for batches, in pinned memory.

    A GPU reads pinned memory itself while the processor prepares the next batch. From other memory the driver copies
    piece by piece.

    Args:
        runtime: see `load_cuda_runtime`. Without it, or if it fails, NumPy allocates the arrays.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._own = threading.local()

    def array(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float32 array with arbitrary content. The thread's next call returns the same memory."""
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
            self._runtime.cudaGetLastError()  # clears the error, which ONNX Runtime's next call would report
            return np.empty(count, np.float32)
        buffer = (ctypes.c_float * count).from_address(place.value or 0)
        # The last array frees the memory. At the end of the process the driver does, perhaps before Python.
        weakref.finalize(buffer, self._runtime.cudaFreeHost, place).atexit = False
        return np.ctypeslib.as_array(buffer)
