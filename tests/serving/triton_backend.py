"""Stands for Triton's ONNX Runtime backend, which no package holds: ONNX Runtime in a backend written in Python.

Triton's own core does all else: it reads config.pbtxt, warms up, makes batches and speaks the protocol. Triton loads
this file as `onnxruntime/model.py`. The sizes of the batches go to the file `batches` beside it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path += os.environ["ROBUSTFEAT_PACKAGES"].split(":")

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton  # type: ignore[import-not-found]


class TritonPythonModel:
    """The name and the methods that Triton looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        (self.taken,), (self.given,) = config["input"], config["output"]
        settings = onnxruntime.SessionOptions()
        threads = config["parameters"].get("intra_op_thread_count", {"string_value": "0"})
        settings.intra_op_num_threads = int(threads["string_value"])
        folder = Path(args["model_repository"], args["model_version"])
        self.session = onnxruntime.InferenceSession(
            folder / config["default_model_filename"], settings, providers=["CPUExecutionProvider"]
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """A batch. (This Triton was built for NumPy 1, and reads NumPy 2's arrays by DLPack only.)"""
        inputs = [np.from_dlpack(triton.get_input_tensor_by_name(one, self.taken["name"])).copy() for one in requests]
        (features,) = self.session.run([self.given["name"]], {self.taken["name"]: np.concatenate(inputs)})
        with Path(__file__).with_name("batches").open("a") as log:
            log.write(f"{len(features)}\n")
        ends = np.cumsum([len(one) for one in inputs])[:-1]
        parts = np.split(features, ends)
        return [
            triton.InferenceResponse([triton.Tensor.from_dlpack(self.given["name"], part.copy())]) for part in parts
        ]
