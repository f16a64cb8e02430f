"""Networks of many kinds in fp16: types that fit each other, and the features of fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx.reference import ReferenceEvaluator

from robustfeat.hub.float16 import convert_to_float16
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.serving.engines.engine import open_engine
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.verify import cosine
from robustfeat.training.export.onnx_files import export_onnx

KINDS = (
    "test_byobnet",
    "test_convnext",
    "test_efficientnet_evos",
    "test_mambaout",
    "test_nfnet",
    "test_vit",
    "test_vit4",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_networks_of_timm_are_converted(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0).eval()
    settings: dict[str, Any] = network.default_cfg  # type: ignore[assignment]
    side = settings["input_size"][-1]
    file = tmp_path / "model.onnx"
    export_onnx(network, Preprocessing(side, 1.0), file)
    content = convert_to_float16(file.read_bytes())
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert not any(tensor.data_type == onnx.TensorProto.FLOAT for tensor in model.graph.initializer)
    images = np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32)
    half = open_engine(file, content, RunOptions("fp16", device="cpu")).run(images)
    exact = open_engine(file, file.read_bytes(), RunOptions(device="cpu")).run(images)
    assert cosine(half, exact).min() > 0.99999
    # By the definition of ONNX every operator rounds to fp16, as on a GPU. The engine does not, on a processor.
    (rounded,) = ReferenceEvaluator(model).run(None, {"pixel_values": images[:1]})
    assert cosine(np.asarray(rounded), exact[:1]).min() > 0.9999
