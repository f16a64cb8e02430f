"""Weights in other files: only files that config.json lists are read, and what was verified is what runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.onnx_ml_pb2 import ModelProto

from robustfeat.errors import ModelFolderError
from robustfeat.hub.external_data import MESSAGES, inline_external_data
from robustfeat.hub.folder import ModelFolder
from robustfeat.serving.engines.engine import open_engine
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.extractor import FeatureExtractor

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def external(location: str, **place: int) -> TensorProto:
    tensor = TensorProto(name="w", dims=VALUES.shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **place}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def in_initializer(tensor: TensorProto) -> ModelProto:
    return helper.make_model(helper.make_graph([], "g", [], [], [tensor]))


def in_constant(tensor: TensorProto) -> ModelProto:
    return helper.make_model(helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "g", [], []))


def in_branch(tensor: TensorProto) -> ModelProto:
    node = helper.make_node("If", ["b"], ["c"], then_branch=in_constant(tensor).graph)
    return helper.make_model(helper.make_graph([node], "g", [], []))


def in_function(tensor: TensorProto) -> ModelProto:
    nodes = in_constant(tensor).graph.node
    function = helper.make_function("d", "f", [], ["c"], nodes, [helper.make_opsetid("", 20)])
    return helper.make_model(helper.make_graph([], "g", [], []), functions=[function])


def in_sparse(tensor: TensorProto) -> ModelProto:
    model = in_initializer(tensor)
    model.graph.sparse_initializer.add(values=tensor, dims=[2, 3])
    return model


def test_every_way_to_a_tensor_is_known() -> None:
    """Compared with the definition that the onnx package holds."""
    ways: dict[str, dict[int, str]] = {}

    def leads_to_tensors(message: Any, above: tuple[str, ...] = ()) -> bool:
        if message.name == "TensorProto":
            return True
        inner = [entry.message_type for entry in message.fields if entry.message_type]
        return any(leads_to_tensors(one, (*above, message.name)) for one in inner if one.name not in above)

    def walk(message: Any) -> None:
        if message.name not in ways:
            inner = [entry for entry in message.fields if entry.message_type and leads_to_tensors(entry.message_type)]
            ways[message.name] = {entry.number: entry.message_type.name for entry in inner}
            for entry in inner:
                walk(entry.message_type)

    walk(ModelProto.DESCRIPTOR)
    ways["TensorProto"] = {}
    assert ways == MESSAGES


@pytest.mark.parametrize("build", [in_initializer, in_constant, in_branch, in_function, in_sparse])
def test_external_data_are_put_inside_wherever_they_are(build: Callable[[TensorProto], ModelProto]) -> None:
    asked: list[str] = []

    def read(name: str) -> bytes:
        asked.append(name)
        return b"12345678" + VALUES.tobytes() + b"rest"

    found = inline_external_data(build(external("w.bin", offset=8, length=24)).SerializeToString(), read)
    assert ModelProto.FromString(found) == build(numpy_helper.from_array(VALUES, "w"))
    assert asked == ["w.bin"]


def test_a_file_without_external_data_stays_as_it_is() -> None:
    content = in_branch(numpy_helper.from_array(VALUES, "w")).SerializeToString()
    assert inline_external_data(content, pytest.fail) is content


def in_part(change: Callable[[TensorProto], None]) -> bytes:
    tensor = external("w.bin")
    change(tensor)
    return bytes(in_initializer(tensor).SerializeToString())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has no graph"),
        (b"junk", "damaged"),
        (b"\x08\x00\x00\x00ORTM" + bytes(40), "damaged"),
        (in_initializer(external("w.bin")).SerializeToString()[:-3], "damaged"),
        (in_part(lambda tensor: tensor.ClearField("data_location")), "incomplete reference"),
        (in_part(lambda tensor: tensor.ClearField("external_data")), "incomplete reference"),
        (in_initializer(external("w.bin", offset=20, length=8)).SerializeToString(), "end outside w.bin"),
        (in_initializer(external("w.bin", offset=-4, length=4)).SerializeToString(), "end outside w.bin"),
        (in_initializer(external("w.bin", length=-4)).SerializeToString(), "end outside w.bin"),
    ],
)
def test_what_leads_nowhere_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        inline_external_data(content, lambda _: VALUES.tobytes())


def externalise(folder: Path, location: str, *, list_it: bool) -> Path:
    """The folder's fp32 network with one of its weights in another file."""
    file = folder / "onnx" / "model.onnx"
    model = onnx.load(file)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    data = weight.raw_data
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    place = file.parent / location
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(data)
    file.write_bytes(model.SerializeToString())
    config = json.loads((folder / "config.json").read_text())
    for changed in [file, *([place] if list_it else [])]:
        name = changed.resolve().relative_to(folder.resolve()).as_posix()
        config["robustfeat"]["files"][name] = hashlib.sha256(changed.read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    return place


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("location", ["weights.data", "../weights.data"])
def test_listed_external_data_are_verified(copy: Path, model: Path, engine: str, location: str) -> None:
    squares = np.zeros((1, 32, 32, 3), np.uint8)
    expected = FeatureExtractor.from_pretrained(model, engine=engine).embed_prepared(squares)
    place = externalise(copy, location, list_it=True)
    assert np.array_equal(FeatureExtractor.from_pretrained(copy, engine=engine).embed_prepared(squares), expected)
    place.write_bytes(bytes(place.stat().st_size))
    with pytest.raises(ModelFolderError, match=r"weights\.data: altered"):
        FeatureExtractor.from_pretrained(copy, engine=engine)


@pytest.mark.parametrize("location", ["weights.data", "../weights.data", "../../weights.data"])
def test_unlisted_external_data_are_refused(copy: Path, location: str) -> None:
    externalise(copy, location, list_it=False)
    with pytest.raises(ModelFolderError, match=r"weights\.data is not listed in config\.json"):
        FeatureExtractor.from_pretrained(copy)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_opens_no_file(copy: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is replaced after it was verified is not run."""
    content = ModelFolder(copy).read_onnx("fp32")
    shutil.rmtree(copy)
    assert open_engine(copy, content, RunOptions(engine=engine)).output_shape[1] == 512


def test_what_is_replaced_while_it_is_read_is_not_used(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every use of a file is a comparison: there is no moment between a check and the use."""
    folder = ModelFolder(copy)
    folder.verify()
    uses: dict[str, Callable[[], object]] = {
        "onnx/model.onnx": lambda: folder.read_onnx("fp32"),
        "golden/dress.jpg": folder.golden,
        "golden/features.npy": folder.golden,
        "model.safetensors": lambda: folder.read("model.safetensors"),
    }
    for name, use in uses.items():
        kept = (copy / name).read_bytes()
        (copy / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(ModelFolderError, match=f"{name}: altered"):
            use()
        (copy / name).write_bytes(kept)
