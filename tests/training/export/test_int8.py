"""int8 files: exact where they may be, near where they must be, and honest about what stays in floating point."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from robustfeat.hub.preprocessing import Preprocessing, decode, preprocess
from robustfeat.serving.verify import MIN_COSINE, cosine
from robustfeat.training.export.assembly import golden_images
from robustfeat.training.export.int8.graph import Int8Layer, write_graph
from robustfeat.training.export.int8.layers import find_layers
from robustfeat.training.export.int8.observation import observe_ranges
from robustfeat.training.export.int8.quantise import Golden, Int8UnfitError, quantize_onnx
from robustfeat.training.export.int8.rounding import round_by_inputs, round_to_nearest
from robustfeat.training.export.onnx_import import import_onnx
from tests.training.export.onnx_networks import SIDE

CONTRACT = Preprocessing(SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
WIDTH = 24
OUTLIER = 400.0


class Network:
    """Blocks of a depthwise and a pointwise convolution, as ONNX."""

    def __init__(self, seed: int = 0) -> None:
        self.draw = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[np.float32]] = {}
        self.keep(zero=0, six=6)

    def keep(self, **values: Any) -> None:
        self.constants |= {name: np.asarray(value, np.float32) for name, value in values.items()}

    def convolution(
        self,
        source: str,
        name: str,
        *shape: int,
        groups: int = 1,
        stride: int = 1,
        outlier: float = 1.0,
        clip: bool = True,
    ) -> str:
        """Adds one; channel 0 of its output is `outlier` times as large where that is not 1."""
        side = shape[2]
        weights = self.draw.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        weights[0] *= outlier
        biases = self.draw.normal(0, 0.2, shape[0])
        self.keep(**{f"{name}.weight": weights, f"{name}.bias": biases})
        self.nodes.append(
            helper.make_node(
                "Conv",
                [source, f"{name}.weight", f"{name}.bias"],
                [f"{name}.out"],
                group=groups,
                strides=[stride] * 2,
                pads=[side // 2] * 4,
            )
        )
        if clip:
            self.nodes.append(helper.make_node("Clip", [f"{name}.out", "zero", "six"], [name]))
        return name if clip else f"{name}.out"

    def save(self, file: Path, last: str) -> Path:
        self.nodes.append(helper.make_node("ReduceMean", [last], ["features"], axes=[2, 3], keepdims=0))
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", WIDTH])],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)
        return file


def planted(file: Path, outlier: float = OUTLIER) -> Path:
    """Depthwise blocks. In the first, one channel is far larger than the others, and the next layer undoes that."""
    network = Network()
    last = network.convolution("pixel_values", "stem", WIDTH, 3, 3, 3, stride=2)
    for block in range(3):
        last = network.convolution(last, f"depth{block}", WIDTH, 1, 3, 3, groups=WIDTH)
        large = outlier if block == 0 else 1.0
        last = network.convolution(last, f"point{block}", WIDTH, WIDTH, 1, 1, outlier=large, clip=False)
        last = network.convolution(last, f"wide{block}", WIDTH, WIDTH, 1, 1)
        if block == 0:
            network.constants["wide0.weight"][:, 0] /= outlier
    return network.save(file, last)


def golden_of(file: Path) -> Golden:
    inputs = preprocess([decode(data) for _, data in golden_images()], CONTRACT)
    return Golden(inputs, run(file.read_bytes(), inputs))


def run(content: bytes, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    features: NDArray[np.float32] = session.run(["features"], {"pixel_values": inputs})[0]
    return features


def run_openvino(file: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    import openvino

    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled(inputs)["features"])


def plain_qdq(file: Path, target: Path, golden: Golden) -> Path:
    """What ONNX Runtime's own quantiser makes of a network."""

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        batches = iter([{"pixel_values": golden.inputs}])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self.batches, None)

    options: dict[str, Any] = {"per_channel": True, "reduce_range": True, "activation_type": QuantType.QUInt8}
    quantize_static(str(file), str(target), Batches(), weight_type=QuantType.QInt8, **options)
    return target


def test_outlier_channels_stay_in_floating_point_and_the_rest_becomes_int8(tmp_path: Path) -> None:
    file = planted(tmp_path / "net.onnx")
    golden, target = golden_of(file), tmp_path / "int8.onnx"
    plain = plain_qdq(file, tmp_path / "plain.onnx", golden)
    assert cosine(run(plain.read_bytes(), golden.inputs), golden.features).min() < MIN_COSINE["int8"]

    shares = quantize_onnx(file, golden, [], CONTRACT, target)
    assert set(shares.kept) == {"point0", "wide0"}
    assert (shares.layers, shares.of) == (8, 10)
    for features in (run(target.read_bytes(), golden.inputs), run_openvino(target, golden.inputs)):
        assert cosine(features, golden.features).min() >= MIN_COSINE["int8"]
    assert_kept_in_floating_point(file, target, shares.kept)


def assert_kept_in_floating_point(file: Path, target: Path, kept: Sequence[str]) -> None:
    """Read from the files alone: kept layers have the network's own weights, and no integers around them."""
    original = {constant.name: numpy_helper.to_array(constant) for constant in onnx.load(file).graph.initializer}
    graph = onnx.load(target).graph
    constants = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
    makers = {name: node.op_type for node in graph.node for name in node.output}
    found = {
        name.removesuffix(".weight"): node
        for node in graph.node
        if node.op_type == "Conv"
        for name in original
        if node.input[1] == name
    }
    assert set(found) == set(kept)
    for name in kept:
        np.testing.assert_array_equal(constants[f"{name}.weight"], original[f"{name}.weight"])
        np.testing.assert_array_equal(constants[f"{name}.bias"], original[f"{name}.bias"])
    others = [node for node in graph.node if node.op_type == "Conv" and node not in found.values()]
    for node in others:
        assert [makers[name] for name in node.input] == ["DequantizeLinear"] * 3


@pytest.mark.parametrize("kept", [[], [0], [1], [2], [3], [6], [2, 3], [1, 4]])
def test_onnx_runtime_computes_in_int8_what_the_file_says_and_nothing_else(tmp_path: Path, kept: list[int]) -> None:
    """Its optimiser turns a floating-point layer between quantised tensors into int8, too, unless the file stops it."""
    model = onnx.load(planted(tmp_path / "net.onnx", outlier=1.0))
    for place, node in enumerate(model.graph.node):
        node.name = f"node{place}"
    layers, golden = find_layers(model), golden_of(tmp_path / "net.onnx")
    ranges, _ = observe_ranges(model, layers, [golden.inputs])
    forms = [
        Int8Layer(layer, round_to_nearest(layer.weights), layer.biases)
        for place, layer in enumerate(layers)
        if place not in kept
    ]
    written = write_graph(model, forms, [layers[place] for place in kept], ranges)
    onnx.checker.check_model(written)
    kinds = collections.Counter(node.op_type for node in optimised(written, tmp_path).graph.node)
    assert kinds["QLinearConv"] == len(forms)
    assert kinds["Conv"] + kinds["FusedConv"] == len(kept)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = onnxruntime.InferenceSession(written.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    features = exact.run(["features"], {"pixel_values": golden.inputs})[0]
    assert cosine(features, run(written.SerializeToString(), golden.inputs)).min() > 0.9995


def tokens(file: Path) -> Path:
    """A class token and patches, two products with a bias behind them, one without, and a linear layer."""
    network = Network()
    last = network.convolution("pixel_values", "patches", WIDTH, 3, 3, 3, stride=8, clip=False)
    network.nodes += [
        helper.make_node("Reshape", [last, "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["patch.tokens"], perm=[0, 2, 1]),
        helper.make_node("Shape", ["pixel_values"], ["size"], start=0, end=1),
        helper.make_node("Concat", ["size", "rest"], ["expanded"], axis=0),
        helper.make_node("Expand", ["class", "expanded"], ["classes"]),
        helper.make_node("Concat", ["classes", "patch.tokens"], ["joined"], axis=1),
        helper.make_node("LayerNormalization", ["joined", "scale"], ["tokens"]),
        helper.make_node("MatMul", ["tokens", "one"], ["product.one"]),
        helper.make_node("Add", ["bias.one", "product.one"], ["shifted.one"]),
        helper.make_node("Relu", ["shifted.one"], ["positive"]),
        helper.make_node("MatMul", ["positive", "two"], ["product.two"]),
        helper.make_node("Add", ["product.two", "bias.two"], ["shifted.two"]),
        helper.make_node("MatMul", ["shifted.two", "three"], ["product.three"]),
        helper.make_node("ReduceMean", ["product.three"], ["pooled"], axes=[1], keepdims=0),
        helper.make_node("Gemm", ["pooled", "four", "bias.four"], ["features"], transB=1),
    ]
    draw = network.draw
    sizes = {"one": (WIDTH, 60), "two": (60, WIDTH), "three": (WIDTH, 40), "four": (WIDTH, 40)}
    network.keep(**{name: draw.normal(0, shape[0] ** -0.5, shape) for name, shape in sizes.items()})
    network.keep(**{"class": 20 * draw.normal(0, 1, (1, 1, WIDTH)), "scale": np.ones(WIDTH)})
    network.keep(**{f"bias.{name}": draw.normal(0, 1, sizes[name][name != "four"]) for name in ("one", "two", "four")})
    constants = [numpy_helper.from_array(value, name) for name, value in network.constants.items()]
    constants += [
        numpy_helper.from_array(np.array(v), n) for n, v in (("shape", [-1, WIDTH, 16]), ("rest", [1, WIDTH]))
    ]
    graph = helper.make_graph(
        network.nodes,
        "network",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", WIDTH])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)
    return file


@pytest.mark.parametrize("known", [True, False])
def test_products_with_matrices_are_int8_too_and_what_openvino_misreads_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """OpenVINO rounds a class token that is joined with int8 patches: known from the graph, or found by running it."""
    if not known:
        monkeypatch.setattr("robustfeat.training.export.int8.layers._is_joined", lambda *_: False)
        monkeypatch.setattr("robustfeat.training.export.int8.layers._is_mean", lambda *_: False)
    file, target = tokens(tmp_path / "net.onnx"), tmp_path / "int8.onnx"
    golden = golden_of(file)
    shares = quantize_onnx(file, golden, [], CONTRACT, target)
    assert (shares.layers, shares.of, sorted(shares.kept)) == (3, 5, ["four", "patches"])
    for features in (run(target.read_bytes(), golden.inputs), run_openvino(target, golden.inputs)):
        assert cosine(features, golden.features).min() > 0.999
    written = onnx.load(target)
    kinds = collections.Counter(node.op_type for node in optimised(written, tmp_path).graph.node)
    assert (kinds["MatMul"], kinds["Gemm"], kinds["Conv"] + kinds["FusedConv"]) == (0, 1, 1)
    original = {constant.name: numpy_helper.to_array(constant) for constant in onnx.load(file).graph.initializer}
    biases = [
        numpy_helper.to_array(constant) for constant in written.graph.initializer if constant.name.endswith("_bias")
    ]
    for name in ("bias.one", "bias.two"):
        (near,) = (
            bias for bias in biases if len(bias) == len(original[name]) and np.allclose(bias, original[name], atol=0.1)
        )
        assert not np.array_equal(near, original[name])


def optimised(model: onnx.ModelProto, scratch: Path) -> onnx.ModelProto:
    """What ONNX Runtime makes of a graph when it loads it."""
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(scratch / "optimised.onnx")
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return onnx.load(scratch / "optimised.onnx")


def test_a_network_without_outliers_is_int8_as_a_whole(tmp_path: Path) -> None:
    file = planted(tmp_path / "net.onnx", outlier=1.0)
    golden = golden_of(file)
    shares = quantize_onnx(file, golden, [], CONTRACT, tmp_path / "int8.onnx")
    assert (shares.layers, shares.multiply_adds, shares.kept) == (10, 1.0, ())
    features = run((tmp_path / "int8.onnx").read_bytes(), golden.inputs)
    plain = run(plain_qdq(file, tmp_path / "plain.onnx", golden).read_bytes(), golden.inputs)
    assert 1 - cosine(features, golden.features).min() < (1 - cosine(plain, golden.features).min()) / 2


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    file = planted(tmp_path / "net.onnx")
    golden = golden_of(file)
    squares = list(np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8))
    for name in ("one", "two"):
        quantize_onnx(file, golden, squares, CONTRACT, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_network_that_int8_changes_too_much_gets_none_and_is_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MIN_COSINE, "int8", 0.99999)
    file = planted(tmp_path / "net.onnx")
    with pytest.raises(Int8UnfitError, match=r"cosine 0\.\d+ on a golden image, and 0\.\d+ with the \d most"):
        quantize_onnx(file, golden_of(file), [], CONTRACT, tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()
    report = import_onnx(file, tmp_path / "model", mean=[0.5], std=[0.25])
    assert report.folder.precisions == ["fp32"]
    assert report.folder.config.int8 == {}
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("net: "))
    assert line.startswith("net: the folder gets no int8 file, which would change its features too much: cosine 0.")


def test_the_folder_says_which_share_is_int8(tmp_path: Path) -> None:
    report = import_onnx(planted(tmp_path / "net.onnx"), tmp_path / "model", mean=[0.5], std=[0.25])
    config = report.folder.config
    assert (config.int8["layers"], config.int8["of"], sorted(config.int8["kept"])) == (8, 10, ["point0", "wide0"])
    pixels = SIDE * SIDE // 4
    per_pixel = {"stem": 27 * WIDTH, "depth": 9 * WIDTH, "point": WIDTH * WIDTH, "wide": WIDTH * WIDTH}
    total = pixels * (per_pixel["stem"] + 3 * sum(list(per_pixel.values())[1:]))
    assert config.int8["multiply_adds"] == round(1 - 2 * pixels * WIDTH * WIDTH / total, 4)
    card = (report.folder.path / "README.md").read_text()
    assert f"is the same network with {config.int8_share} in int8; the others stay in fp32." in card


def largest_pair(integers: NDArray[np.int8]) -> int:
    """The largest sum of two sizes within an output."""
    sizes = np.sort(np.abs(integers.astype(int)), axis=2)
    return int((sizes[:, :, -1] + (sizes[:, :, -2] if sizes.shape[2] > 1 else 0)).max())


@pytest.mark.parametrize("shape", [(1, 8, 200), (6, 1, 9), (4, 2, 1), (1, 5, 2)])
def test_no_two_products_overflow_16_bits(shape: tuple[int, int, int]) -> None:
    draw = np.random.default_rng(2)
    weights = draw.standard_t(2, shape).astype(np.float32)  # with outliers
    weights[0, 0] = 0
    inputs = draw.normal(0, 1, (shape[0], shape[2], 500)).astype(np.float32) ** 3
    for rounded in (round_to_nearest(weights), round_by_inputs(weights, inputs @ inputs.transpose(0, 2, 1))):
        assert 255 * largest_pair(rounded.integers) < 2**15
        assert rounded.weights.dtype == np.float32
        assert np.isfinite(rounded.weights).all()
        assert not rounded.integers[0, 0].any()
    steps = np.abs(round_to_nearest(weights).weights - weights) / round_to_nearest(weights).scales
    assert steps.max() <= 1


def test_errors_that_end_in_the_largest_weight_do_not_make_it_too_large() -> None:
    """Inputs are alike, and the largest weight is rounded last, so that it makes up for all others."""
    draw = np.random.default_rng(2)
    weights = draw.uniform(-1, 1, (1, 32, 200)).astype(np.float32)
    weights[:, :, :2] = 2
    inputs = draw.normal(0, 1, (1, 1, 500)) + 0.1 * draw.normal(0, 1, (1, 200, 500))
    inputs[:, 0] *= 0.25
    moments = (inputs @ inputs.transpose(0, 2, 1)).astype(np.float32)
    assert 255 * largest_pair(round_by_inputs(weights, moments).integers) < 2**15


def test_weights_are_rounded_as_gptq_rounds_them() -> None:
    """Against the published algorithm: quantise a column, and spread its error by the inverse of the Hessian."""
    draw = np.random.default_rng(3)
    weights = draw.normal(0, 1, (1, 7, 12)).astype(np.float32)
    inputs = (draw.normal(0, 1, (12, 12)) @ draw.normal(0, 1, (12, 400))).astype(np.float32)
    moments = (inputs @ inputs.T)[None]
    rounded = round_by_inputs(weights, moments)

    rest, hessian = weights[0].astype(np.float64), moments[0].astype(np.float64)
    hessian += 0.05 * np.trace(hessian) / 12 * np.eye(12)
    expected, left = np.zeros_like(rest), list(range(12))
    scales = rounded.scales[0, :, 0].astype(np.float64)
    sizes = np.abs(rest) / scales[:, None]
    second = np.rint(np.sort(sizes, axis=1)[:, -2:-1])
    limits = np.where(sizes == sizes.max(1, keepdims=True), np.minimum(127, 128 - second), second)
    for column in np.argsort(-np.diag(moments[0]), kind="stable"):
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        place = left.index(column)
        expected[:, column] = np.clip(np.rint(rest[:, column] / scales), -limits[:, column], limits[:, column])
        error = (rest[:, column] - expected[:, column] * scales) / inverse[place, place]
        rest[:, left] -= error[:, None] * inverse[place]
        left.remove(column)
    np.testing.assert_array_equal(rounded.integers[0], expected)

    def power(found: NDArray[np.float32]) -> float:
        return float((((weights - found)[0] @ inputs) ** 2).mean())

    assert power(rounded.weights) < power(round_to_nearest(weights).weights) / 2


def test_the_columns_of_a_convolution_are_what_it_multiplies() -> None:
    """Weights times columns, with every place drawn, are ONNX Runtime's outputs."""
    draw = np.random.default_rng(4)
    cases: list[tuple[int, dict[str, Any]]] = [(1, {}), (3, {"strides": [2, 1]}), (6, {"dilations": [2, 2]})]
    for groups, settings in cases:
        kernel = draw.normal(0, 1, (12, 6 // groups, 3, 3)).astype(np.float32)
        node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 0, 2, 1], group=groups, **settings)
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6, 9, 11])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(kernel, "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        (layer,) = find_layers(model)
        image = draw.normal(0, 1, (1, 6, 9, 11)).astype(np.float32)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        expected = session.run(None, {"x": image})[0]
        found = layer.weights @ layer.columns(image, 10_000)
        np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-4)
        np.testing.assert_array_equal(layer.stored(layer.weights), kernel)
