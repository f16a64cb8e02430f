"""Networks that no exporter writes: each is refused or ends in one line, and Ctrl+C ends the wait for one."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from robustfeat.errors import EngineError, ModelFolderError
from robustfeat.hub.folder import ModelFolder, seal_folder
from robustfeat.serving.engines.engine import open_engine
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.extractor import FeatureExtractor

FLOAT = TensorProto.FLOAT
ENGINES = ("onnxruntime", "openvino")
IMAGES = np.ones((2, 3, 8, 8), np.float32)


def network(nodes: list[Any], *, output: int = FLOAT, shape: tuple[Any, ...] = ("n", 4), **weights: Any) -> bytes:
    """An ONNX file whose nodes turn pixel_values, and `mean` of each image (n, 1), into features."""
    mean = helper.make_node("ReduceMean", ["pixel_values", "axes"], ["mean_4d"])
    flat = helper.make_node("Flatten", ["mean_4d"], ["mean"])
    tensors = {"axes": np.array([1, 2, 3]), **weights}
    graph = helper.make_graph(
        [mean, flat, *nodes],
        "g",
        [helper.make_tensor_value_info("pixel_values", FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("features", output, list(shape))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def times(value: float) -> bytes:
    return network([helper.make_node("Mul", ["mean", "w"], ["features"])], w=np.full((1, 4), value, np.float32))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_an_error(engine: str, value: float, tmp_path: Path) -> None:
    running = open_engine(tmp_path, times(value), RunOptions(engine=engine))
    with pytest.raises(EngineError, match="features are not finite for 2 of 2 images"):
        running.run(IMAGES)


@pytest.mark.parametrize("engine", ENGINES)
def test_only_images_at_fault_are_counted(engine: str, tmp_path: Path) -> None:
    running = open_engine(tmp_path, times(1e38), RunOptions(engine=engine))
    assert np.allclose(running.run(IMAGES), 1e38)
    images = IMAGES.copy()
    images[1] = 10
    with pytest.raises(EngineError, match="not finite for 1 of 2 images"):
        running.run(images)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING])
def test_other_types_of_features_are_refused(engine: str, kind: int, tmp_path: Path) -> None:
    if kind == TensorProto.STRING:
        words = np.array([["a", "b", "c", "d"]], dtype=object)
        content = network([helper.make_node("Identity", ["w"], ["features"])], output=kind, shape=(1, 4), w=words)
    else:
        content = network([helper.make_node("Cast", ["mean"], ["features"], to=kind)], output=kind, shape=("n", 1))
    with pytest.raises(ModelFolderError, match=r"must be float32 tensors|cannot load it"):
        open_engine(tmp_path, content, RunOptions(engine=engine))


@pytest.mark.parametrize("engine", ENGINES)
def test_too_few_rows_and_failures_at_run_time_are_one_line(engine: str, tmp_path: Path) -> None:
    content = network([helper.make_node("Identity", ["w"], ["features"])], w=np.ones((1, 4), np.float32))
    with pytest.raises(EngineError, match=r"must be \(2, 4\) float32; got \(1, 4\)"):
        open_engine(tmp_path, content, RunOptions(engine=engine)).run(IMAGES)
    nodes = [
        helper.make_node("Shape", ["mean"], ["shape"]),
        helper.make_node("Add", ["shape", "more"], ["other"]),
        helper.make_node("Reshape", ["mean", "other"], ["features"]),
    ]
    with pytest.raises(EngineError, match="cannot run the model") as caught:
        open_engine(tmp_path, network(nodes, more=np.array([1, 3])), RunOptions(engine=engine)).run(IMAGES)
    assert "\n" not in str(caught.value)


def test_embedding_with_a_model_whose_features_are_nan_fails(
    model: Path, tmp_path: Path, robustfeat: Any, example_files: list[Path]
) -> None:
    folder = replace_network(model, tmp_path, lambda found: found.graph.node[-1].output.__setitem__(0, "before"))
    result = robustfeat("embed", example_files[0], "--model", folder, "--out", tmp_path / "f.npy")
    assert result.returncode == 1
    assert "features are not finite" in result.stderr
    assert not (tmp_path / "f.npy").exists()


def replace_network(model: Path, tmp_path: Path, change: Callable[[Any], None]) -> Path:
    """A copy of a folder whose features are divided by zero."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    found = onnx.load(folder / "onnx" / "model.onnx")
    change(found)
    found.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    found.graph.node.append(helper.make_node("Mul", ["before", "zero"], ["nothing"]))
    found.graph.node.append(helper.make_node("Div", ["nothing", "zero"], ["features"]))
    onnx.save(found, folder / "onnx" / "model.onnx")
    seal_folder(folder, ModelFolder(folder).config, "")
    return folder


def test_ctrl_c_ends_the_wait_for_an_endless_network(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = FeatureExtractor.from_pretrained(model)
    ended, main = threading.Event(), threading.main_thread().ident
    assert main is not None
    monkeypatch.setattr(extractor.engine, "run", lambda values: ended.wait(30))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores the signal
    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            extractor.embed_prepared(np.zeros((1, 32, 32, 3), np.uint8))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - began < 5
    ended.set()
