"""ONNX files of vision networks become model folders whose features are those of the file itself."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
import timm
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from robustfeat import FeatureExtractor
from robustfeat.cli import cli
from robustfeat.errors import InputError, RobustFeatError
from robustfeat.training.export.assembly import ExportReport
from robustfeat.training.export.onnx_import import import_onnx
from robustfeat.training.export.stamp import quiet
from tests.training.export.bare_command import run_without_torch
from tests.training.export.onnx_networks import SIDE, convolutional, run_file, save, transformer

HALF = {"mean": [0.5], "std": [0.25]}


def number(name: str, value: float, kind: type = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value, kind), name)


def pixels(files: list[Path], side: int = SIDE) -> NDArray[np.float32]:
    """(n, 3, S, S) in [0, 1], by Pillow and NumPy; the photographs are cut to squares first."""
    squares = []
    for file in files:
        with Image.open(file) as image:
            squares.append(np.asarray(square(image).resize((side, side), Image.Resampling.BILINEAR)))
    return np.asarray(np.stack(squares).transpose(0, 3, 1, 2) / 255, np.float32)


def square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    return image.convert("RGB").crop((0, 0, side, side))


def embed(report: ExportReport, files: list[Path]) -> NDArray[np.float32]:
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(square(image))
    return FeatureExtractor.from_pretrained(report.folder.path, threads=1).embed(images)


def make(file: Path, **options: Any) -> ExportReport:
    return import_onnx(file, file.parent / "model", **{"int8": False, **HALF, **options})


@pytest.fixture
def photos(example_files: list[Path]) -> list[Path]:
    return example_files[:5]


def normalised(files: list[Path]) -> NDArray[np.float32]:
    return np.asarray((pixels(files) - 0.5) / 0.25, np.float32)


def test_a_file_becomes_a_folder_with_its_features(tmp_path: Path, photos: list[Path]) -> None:
    file = convolutional(tmp_path / "net.onnx")
    report = make(file, name="net-v1", terms="be kind", license_id="mit")
    np.testing.assert_allclose(embed(report, photos), run_file(file, normalised(photos)), atol=1e-4)
    folder = report.folder
    assert (folder.config.name, folder.config.feature_size) == ("net-v1", 16)
    assert report.cosines["fp32"] > 0.9999
    assert "model.safetensors" not in folder.config.files
    assert len(folder.golden()[0]) == 8
    stored = onnx.load(folder.onnx("fp32"))
    assert [value.name for value in (*stored.graph.input, *stored.graph.output)] == ["pixel_values", "features"]
    assert folder.config.provenance["license"] == "mit"


def test_int8_is_made_from_the_golden_images(tmp_path: Path) -> None:
    report = make(convolutional(tmp_path / "net.onnx"), int8=True)
    assert report.folder.precisions == ["fp32", "int8"]
    assert report.cosines["int8"] > 0.99


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_becomes_free(tmp_path: Path, photos: list[Path], batch: int) -> None:
    file = convolutional(tmp_path / "net.onnx", (batch, 3, SIDE, SIDE))
    images = normalised(photos)
    free = convolutional(tmp_path / "free.onnx")
    np.testing.assert_allclose(embed(make(file), photos), run_file(free, images), atol=1e-4)


@pytest.mark.parametrize(("batch", "pooling"), [(1, "cls"), (1, "mean"), (4, "cls")])
def test_shapes_and_tokens_of_a_fixed_batch_are_freed(
    tmp_path: Path, photos: list[Path], batch: int, pooling: str
) -> None:
    file = transformer(tmp_path / "vit.onnx", (batch, 3, SIDE, SIDE))
    tokens = run_file(transformer(tmp_path / "one.onnx"), normalised(photos))
    expected = tokens[:, 0] if pooling == "cls" else tokens.mean(1)
    report = make(file, pooling=pooling)
    np.testing.assert_allclose(embed(report, photos), expected, atol=1e-4)
    graph = onnx.load(report.folder.onnx("fp32")).graph
    assert {tensor.name for tensor in graph.initializer} <= {name for node in graph.node for name in node.input}


@pytest.mark.parametrize("batch", [1, 4])
def test_a_batch_that_shares_a_dimension_is_freed(tmp_path: Path, photos: list[Path], batch: int) -> None:
    report = make(fixed_by_heads(tmp_path / "net.onnx", batch))
    np.testing.assert_allclose(embed(report, photos), normalised(photos).mean((2, 3)), atol=1e-4)


SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("test_vit", {}),
        pytest.param("test_convnext", {}, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", SWIN, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("tracing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_networks_that_pytorch_exports_for_one_image_take_any_number(
    tmp_path: Path, photos: list[Path], name: str, sizes: dict[str, Any], tracing: bool
) -> None:
    torch.manual_seed(0)
    network: Any = timm.create_model(name, num_classes=0, **sizes).eval()
    side, file = sizes.get("img_size", network.pretrained_cfg["input_size"][1]), tmp_path / "net.onnx"
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        more: dict[str, Any] = {} if tracing else {"external_data": False, "verbose": False}
        torch.onnx.export(network, (torch.zeros(1, 3, side, side),), str(file), dynamo=not tracing, **more)
    images = np.asarray((pixels(photos, side) - 0.5) / 0.25, np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(embed(make(file), photos), expected, atol=2e-3)


def test_channels_last_and_bytes_are_made_of_our_input(tmp_path: Path, photos: list[Path]) -> None:
    before = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["floats", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["pixels"], perm=[0, 3, 1, 2]),
    ]
    scale = number("scale", 64)
    file = convolutional(
        tmp_path / "net.onnx", (None, SIDE, SIDE, 3), before=before, initializers=[scale], kind=TensorProto.UINT8
    )
    squares = np.round(pixels(photos) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(embed(make(file, mean=None, std=None), photos), run_file(file, squares), atol=1e-4)


def test_half_precision_is_cast(tmp_path: Path, photos: list[Path]) -> None:
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Concat", ["pooled", "pooled"], ["out"], axis=1),
    ]
    file = save(tmp_path / "net.onnx", nodes, (None, 3, SIDE, SIDE), [], kind=TensorProto.FLOAT16)
    features = embed(make(file), photos)
    expected = np.tile(normalised(photos).mean((2, 3)), 2)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=5e-3)


@pytest.mark.parametrize(("output", "pooling"), [("pooled", None), ("map", "mean"), ("vector", None)])
def test_any_tensor_can_be_the_features(tmp_path: Path, photos: list[Path], output: str, pooling: str | None) -> None:
    file = convolutional(tmp_path / "net.onnx", outputs=("out", "map"))
    maps = run_file(file, normalised(photos), "map")
    np.testing.assert_allclose(embed(make(file, output=output, pooling=pooling), photos), maps.mean((2, 3)), atol=1e-4)


def test_sides_that_are_free_become_the_size_asked_for(tmp_path: Path, photos: list[Path]) -> None:
    file = convolutional(tmp_path / "net.onnx", ("N", "C", "H", "W"))
    report = make(file, image_size=48, crop_pct=0.75, interpolation="bicubic", crop_mode="squash")
    contract = report.folder.config.preprocessing
    assert (contract.image_size, contract.resize_size, contract.interpolation) == (48, 64, "bicubic")
    with pytest.raises(InputError, match=r"takes images of any size; pass .* `image_size`"):
        make(file)


def test_weights_beside_the_file_and_other_inputs_that_are_not_needed(tmp_path: Path, photos: list[Path]) -> None:
    text = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [None, 8])
    double = helper.make_node("Add", ["input_ids", "input_ids"], ["text"])
    file = convolutional(tmp_path / "both.onnx", before=[double, helper.make_node("Identity", ["image"], ["pixels"])],
                         inputs=[text], outputs=("text", "out"), external=True)  # fmt: skip
    report = make(file, output="out")
    assert (tmp_path / "both.onnx.data").stat().st_size > 1000
    alone = convolutional(tmp_path / "alone.onnx")
    np.testing.assert_allclose(embed(report, photos), run_file(alone, normalised(photos)), atol=1e-4)


def test_names_that_mean_something_else_are_renamed(tmp_path: Path, photos: list[Path]) -> None:
    before = [helper.make_node("Identity", ["image"], ["pixel_values"]),
              helper.make_node("Mul", ["pixel_values", "pixel_values"], ["features"]),
              helper.make_node("Sqrt", ["features"], ["pixels"])]  # fmt: skip
    file = convolutional(tmp_path / "net.onnx", before=before)
    features = embed(make(file, mean=[0], std=[1]), photos)
    np.testing.assert_allclose(features, run_file(file, pixels(photos)), atol=1e-4)


def test_a_classifier_and_pixels_normalised_inside_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [helper.make_node("Sub", ["image", "half"], ["pixels"])]
    half = number("half", 0.5)
    file = convolutional(tmp_path / "net.onnx", before=before, initializers=[half])
    with pytest.raises(InputError, match=r"does not say how pixels are normalised \(it begins with Sub"):
        make(file, mean=None)
    make(file)
    said = capsys.readouterr().err
    assert "the features are out, which a linear layer gives; if that is the classifier, name its input vector" in said
    assert "the network begins with Sub, which may normalise pixels, too" in said


def test_a_quantised_network_gets_no_second_int8_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["bytes"]),
              helper.make_node("DequantizeLinear", ["bytes", "scale", "zero"], ["pixels"])]  # fmt: skip
    constants = [number("scale", 0.02), number("zero", 128, np.uint8)]
    report = make(convolutional(tmp_path / "net.onnx", before=before, initializers=constants), int8=True)
    assert report.folder.precisions == ["fp32"]
    assert "is quantised, so the folder gets no int8 file of its own" in capsys.readouterr().err


def custom(file: Path, domain: str) -> Path:
    """A network with an operator that is no standard one: the image times itself."""
    node = helper.make_node("TransposeMatMul", ["image", "image"], ["pixels"], domain=domain)
    return convolutional(file, before=[node])


def test_an_engine_that_cannot_load_the_network_is_named_and_left_out(
    tmp_path: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = custom(tmp_path / "net.onnx", "com.microsoft")
    report = make(file)
    assert "net: openvino cannot run its fp32 file" in capsys.readouterr().err
    np.testing.assert_allclose(embed(report, photos), run_file(file, normalised(photos)), rtol=1e-3)


def test_weights_in_a_files_functions_lie_beside_it(tmp_path: Path, photos: list[Path]) -> None:
    """Tensors hide in the attributes of functions, too; a link within the folder is followed."""
    file = convolutional(
        tmp_path / "net.onnx", before=[helper.make_node("Scaled", ["image"], ["pixels"], domain="own")]
    )
    scale = number("scale", 0.5)
    onnx.external_data_helper.set_external_data(scale, "linked.bin", 0, 4)
    (tmp_path / "scale.bin").write_bytes(scale.raw_data)
    (tmp_path / "linked.bin").symlink_to("scale.bin")
    scale.ClearField("raw_data")
    nodes = [helper.make_node("Constant", [], ["scale"], value=scale), helper.make_node("Mul", ["x", "scale"], ["y"])]
    model = onnx.load(file)
    model.functions.append(helper.make_function("own", "Scaled", ["x"], ["y"], nodes, [helper.make_opsetid("", 17)]))
    file.write_bytes(model.SerializeToString())
    report = make(file)
    half = [helper.make_node("Mul", ["image", "half"], ["pixels"])]
    plain = convolutional(tmp_path / "plain.onnx", before=half, initializers=[number("half", 0.5)])
    np.testing.assert_allclose(embed(report, photos), run_file(plain, normalised(photos)), atol=1e-4)
    assert report.folder.config.provenance["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("place", "name"),
    [("net.onnx", "net"), ("dino/model.onnx", "dino"), ("dino/onnx/model_quantized.onnx", "dino"),
     ("dino/models.onnx", "models")],
)  # fmt: skip
def test_a_model_is_named_after_its_file_or_folder(tmp_path: Path, place: str, name: str) -> None:
    assert make(convolutional(tmp_path / place)).folder.config.name == name


def text_input(file: Path) -> Path:
    mask = helper.make_tensor_value_info("mask", TensorProto.FLOAT, [None, 3, SIDE, SIDE])
    return convolutional(file, before=[helper.make_node("Mul", ["image", "mask"], ["pixels"])], inputs=[mask])


def dynamic_quantisation(file: Path) -> Path:
    """The range that quantises an image is that of its whole batch."""
    quantised = ["bytes", "scale", "zero"]
    before = [helper.make_node("DynamicQuantizeLinear", ["image"], quantised),
              helper.make_node("DequantizeLinear", quantised, ["coarse"]),
              helper.make_node("ReduceMax", ["image"], ["most"], keepdims=0),
              helper.make_node("Mul", ["coarse", "most"], ["pixels"])]  # fmt: skip
    return convolutional(file, before=before)


def missing_data(file: Path) -> Path:
    convolutional(file, external=True)
    file.with_name("net.onnx.data").unlink()
    return file


def data_at(file: Path, place: str) -> Path:
    """A network whose weights lie in `place`, as its file says."""
    model = onnx.load(convolutional(file))
    for tensor in model.graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, place, 0, len(tensor.raw_data))
        tensor.ClearField("raw_data")
    file.write_bytes(model.SerializeToString())
    return file


def escaping_data(file: Path) -> Path:
    file.parent.parent.joinpath("secret.bin").write_bytes(bytes(9999))
    return data_at(file, "../secret.bin")


def linked_data(file: Path) -> Path:
    file.parent.parent.joinpath("secret.bin").write_bytes(bytes(9999))
    file.with_name("net.onnx.data").symlink_to("../secret.bin")
    return data_at(file, "net.onnx.data")


def circular_data(file: Path) -> Path:
    file.with_name("net.onnx.data").symlink_to("net.onnx.data")
    return data_at(file, "net.onnx.data")


def waiting_data(file: Path) -> Path:
    os.mkfifo(file.with_name("net.onnx.data"))
    return data_at(file, "net.onnx.data")


def beyond_two_gigabytes(file: Path, names: tuple[str, ...] = ("net.onnx.data",)) -> Path:
    """A network that needs some bytes of files that are larger than 2 GB together, and hold no block."""
    model = onnx.load(convolutional(file))
    for number, tensor in enumerate(model.graph.initializer):
        onnx.external_data_helper.set_external_data(tensor, names[number % len(names)], 0, len(tensor.raw_data))
        tensor.ClearField("raw_data")
    file.write_bytes(model.SerializeToString())
    for name in names:
        with file.with_name(name).open("wb") as data:
            data.truncate(2**31 // len(names))
    return file


def huge(file: Path) -> Path:
    with file.open("wb") as content:
        content.truncate(2**31)
    return file


def constant(file: Path) -> Path:
    nodes = [helper.make_node("Identity", ["image"], ["same"]), helper.make_node("Identity", ["fixed"], ["out"])]
    return save(file, nodes, (None, 3, SIDE, SIDE), [numpy_helper.from_array(np.ones((1, 4), np.float32), "fixed")])


def integers(file: Path) -> Path:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("ArgMax", ["flat"], ["out"], axis=1),
    ]
    return save(file, nodes, (None, 3, SIDE, SIDE), [])


def fixed_by_heads(file: Path, batch: int = 1, *, mixing: bool = False) -> Path:
    """Batch and channels share a dimension, as in older attention; with `mixing` the channels come first."""
    nodes = [helper.make_node("Transpose", ["image"], ["turned"], perm=[1, 0, 2, 3] if mixing else [0, 1, 2, 3]),
             helper.make_node("Reshape", ["turned", "shape"], ["merged"]),
             helper.make_node("ReduceMean", ["merged"], ["mean"], axes=[1, 2], keepdims=0),
             helper.make_node("Reshape", ["mean", "back"], ["out"])]  # fmt: skip
    shapes = [numpy_helper.from_array(np.array(value, np.int64), name)
              for name, value in (("shape", [3 * batch, SIDE, SIDE]), ("back", [batch, 3]))]  # fmt: skip
    return save(file, nodes, (batch, 3, SIDE, SIDE), shapes)


def circle(file: Path) -> Path:
    nodes = [helper.make_node("Add", ["out", "image"], ["sum"]), helper.make_node("Flatten", ["sum"], ["out"])]
    return save(file, nodes, (None, 3, SIDE, SIDE), [])


def filled(file: Path, value: float) -> Path:
    """A network whose weights are all the same."""
    model = onnx.load(convolutional(file))
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(tensor), value), tensor.name))
    file.write_bytes(model.SerializeToString())
    return file


def junk(file: Path) -> Path:
    file.write_bytes(b"\x89PNG and so on")
    return file


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "junk": (junk, {}, "not an ONNX file"),
    "empty": (lambda file: file.write_bytes(b"") or file, {}, "not an ONNX file"),
    "missing": (lambda file: file, {}, "cannot be read .No such file"),
    "grey": (lambda file: convolutional(file, (None, 1, SIDE, SIDE)), {}, r"takes image \(\?, 1, 32, 32\) float; exp"),
    "video": (lambda file: convolutional(file, (None, 3, 8, SIDE, SIDE)), {}, "expected images in colour"),
    "oblong": (lambda file: convolutional(file, (None, 3, SIDE, 64)), {}, "only square images"),
    "other size": (convolutional, {"image_size": 64}, "image_size=64: .*net.onnx takes image .* and no other size"),
    "too small": (lambda file: convolutional(file, (None, 3, 4, 4)), {}, "image_size must be between 8 and 4096"),
    "too large": (lambda file: convolutional(file, (None, 3, 2**40, 2**40)), {}, "image_size must be between 8 and"),
    "huge batch": (lambda file: convolutional(file, (2**40, 3, SIDE, SIDE)), {}, "its batch is fixed to 109951162"),
    "circle": (circle, {}, "not in the order in which they run .'out' is read before it is made"),
    "not finite": (lambda file: filled(file, np.nan), {}, "its features are not finite; export it again"),
    "zeros": (lambda file: filled(file, 0), {}, "ONNX Runtime gives nothing but zeros for a photograph"),
    "integers in": (lambda file: convolutional(file, kind=TensorProto.INT64), {}, "expected an image in float32"),
    "integers out": (integers, {}, "out is int64; expected floating-point numbers"),
    "second input": (text_input, {}, r"out needs 2 inputs: image .*; mask .*; expected one, the image"),
    "no input": (constant, {}, "out depends on no input"),
    "two outputs": (
        lambda file: convolutional(file, outputs=("out", "map")), {}, "has 2 outputs: out .*; map .*; pass .* `output`"
    ),
    "unknown output": (convolutional, {"output": "logits"}, "output=logits: .* its outputs are out"),
    "map": (convolutional, {"output": "map"}, r"map is of shape \(1, 16, 8, 8\), a map and no vector.*`pooling=mean`"),
    "class of a map": (convolutional, {"output": "map", "pooling": "cls"}, "a map and no vector"),
    "tokens": (transformer, {}, r"out is of shape \(1, 17, 16\), tokens and no vector.*; pass `pooling=cls` or"),
    "pooled twice": (convolutional, {"pooling": "mean"}, "pooling=mean: .* a vector per image already"),
    "batch of 1": (
        lambda file: fixed_by_heads(file, mixing=True), {}, "its batch is fixed to 1, and .* mix; export it again"
    ),
    "batch of 4": (lambda file: fixed_by_heads(file, 4, mixing=True), {}, "its batch is fixed to 4, and"),
    "shared batch": (dynamic_quantisation, {}, "the features of an image change with the other images of its batch"),
    "operator": (lambda file: custom(file, "ai.other"), {}, "ONNX Runtime .* cannot load it .*TransposeMatMul"),
    "opset": (lambda file: convolutional(file, opset=99), {}, r"ONNX Runtime .* cannot load it .* opset ai.onnx 99;"),
    "ir version": (lambda file: convolutional(file, ir_version=99), {}, "IR version 99"),
    "data": (missing_data, {}, r"its weights lie in net.onnx.data, which cannot be read .*; put that file beside"),
    "data elsewhere": (escaping_data, {}, r"its weights lie in ../secret.bin, which cannot be read"),
    "data behind a link": (linked_data, {}, "net.onnx.data, which cannot be read .it lies outside the folder"),
    "data in a circle": (circular_data, {}, "net.onnx.data, which cannot be read"),
    "data of a pipe": (waiting_data, {}, "net.onnx.data, which cannot be read .it is not a regular file"),
    "2 GB": (huge, {}, "larger than 2 GB"),
    "2 GB of data": (beyond_two_gigabytes, {}, "larger than 2 GB"),
    "2 GB in two": (lambda file: beyond_two_gigabytes(file, ("a", "b")), {}, "larger than 2 GB"),
    "no mean": (convolutional, {"mean": None}, "does not say how pixels are normalised; pass `mean` and `std`"),
    "two means": (convolutional, {"mean": [0.1, 0.2]}, "mean and std must hold three numbers"),
    "no deviation": (convolutional, {"std": [0.0]}, "std from 1e-6"),
    "filter": (convolutional, {"interpolation": "linear"}, "interpolation must be one of"),
    "crop mode": (convolutional, {"crop_mode": "stretch"}, "crop_mode must be one of"),
    "calibration": (convolutional, {"int8": True, "calibration": "nosuch"}, "nosuch"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_named_in_one_line_and_nothing_is_left(tmp_path: Path, case: str) -> None:
    write, options, message = BAD[case]
    (tmp_path / "a").mkdir()
    file = write(tmp_path / "a" / "net.onnx")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RobustFeatError) as caught:
        make(file, **options)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_needs_no_torch(tmp_path: Path, example_files: list[Path]) -> None:
    file = convolutional(tmp_path / "net.onnx", ("N", 3, "H", "W"))
    out, options = tmp_path / "model", ["--mean", "0.5,0.5,0.5", "--std", "1/4", "--image-size", "32"]
    done = run_without_torch("import", file, "--out", out, *options, "--output", "vector", "--crop-mode", "border")
    assert done.returncode == 0, done.stderr
    assert re.search(r"model: net; against ONNX Runtime: fp32 cosine 1\.0+, int8 cosine 0\.99", done.stderr)
    contract = FeatureExtractor.from_pretrained(out).config.preprocessing
    assert (contract.std, contract.mean, contract.crop_mode) == ((0.25,) * 3, (0.5,) * 3, "border")
    done = run_without_torch("verify", out, "--quiet")
    assert (done.returncode, "pytorch" in done.stdout) == (0, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.onnx", "--mean", "grey"], "--mean grey: expected one number, or three between commas, such as"),
        (["net.onnx", "--std", "1/0"], "--std 1/0: expected one number"),
        (["net.onnx", "--std", "1,2"], "--std 1,2: expected one number"),
        (["net.onnx", "--weights", "w.pt"], "--weights w.pt: belongs to timm:NAME, not to net.onnx; leave"),
        (["net.onnx", "--mean", "0", "--std", "1", "--output", "x"], "--output x: net.onnx has no tensor of that name; "
         "its outputs are out"),
        (["timm:resnet18", "--pooling", "mean"], "--pooling mean: belongs to "),
        (["nosuch.onnx"], "nosuch.onnx: no such file or folder; expected timm:NAME, torchvision:NAME"),
        (["net.txt"], "net.txt: is a file, and not named as an ONNX file; expected"),
        (["nosuch"], "nosuch: expected timm:NAME"),
        (["hf:net"], "hf:net: expected hf:ORG/NAME, a repository on the Hub"),
        (["hf:org/net", "--mean", "0.5"], "--mean 0.5: belongs to FILE.onnx, not to hf:org/net; leave --mean out"),
        (["org/net"], "org/net: no such file or folder; expected timm:NAME"),
    ],
)  # fmt: skip
def test_the_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    convolutional(tmp_path / "net.onnx")
    (tmp_path / "net.txt").touch()
    with pytest.raises(click.ClickException) as caught:
        cli.main(["import", *arguments, "--out", "model"], standalone_mode=False)
    assert caught.value.message.startswith(message)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("package", "extra"), [("onnx", "onnx"), ("onnxruntime", "cpu")])
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, package: str, extra: str) -> None:
    file = convolutional(tmp_path / "net.onnx")
    done = run_without_torch("import", file, "--out", tmp_path / "model", missing=package)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"robustfeat: this needs {package}: pip install 'robustfeat[{extra}]'\n"
