"""Conversion to fp16, compared with the definition of ONNX, with ONNX Runtime and with its own converter."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.onnx_ml_pb2 import GraphProto, ModelProto, NodeProto
from onnx.reference import ReferenceEvaluator

from robustfeat.hub.catalog import builtin_model
from robustfeat.hub.float16 import convert_to_float16, with_float32_ends
from robustfeat.hub.protobuf import Message
from robustfeat.serving.verify import cosine
from tests import built_in

FLOAT, HALF, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BOOL
WEIGHTS: dict[str, NDArray[Any]] = {
    "conv": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32),
    "scale": np.array([1, 2, 3, 4], np.float32),
    "bias": np.array([0.5, -1, 0, 2], np.float32),
    "mean": np.array([1e5, 0, -2, 0.1], np.float32),
    "variance": np.array([1e9, 1e-9, 4, 0.25], np.float32),
    "scales": np.array([1, 1, 16 / 14, 16 / 14], np.float32),
    "epsilon": np.array(1e-12, np.float32),
    "masked": np.array(-3.4e38, np.float32),
    "axes": np.array([2, 3]),
}
IMAGES = np.random.default_rng(1).normal(size=(5, 3, 16, 16)).astype(np.float32)


def node(operator: str, reads: str, written: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operator, reads.split(), [written], **attributes)


def branch(name: str, factor: float) -> GraphProto:
    nodes = [
        helper.make_node("Constant", [], [f"{name}_factor"], value_float=factor),
        node("Mul", f"resized {name}_factor", name),
    ]
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, FLOAT, None)])


def model_of(nodes: list[NodeProto], end: int = FLOAT, **functions: Any) -> bytes:
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("pixel_values", end, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("features", end, ["n", 4])],
        [numpy_helper.from_array(value, name) for name, value in WEIGHTS.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10, **functions).SerializeToString())


def network() -> bytes:
    """A network with every kind of number that the conversion has to think about."""
    doubled = [
        helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.array(2, np.float32))),
        node("Mul", "x two", "y"),
    ]
    nodes = [
        node("Conv", "pixel_values conv", "c"),
        node("BatchNormalization", "c scale bias mean variance", "b", epsilon=1e-3),
        helper.make_node("Resize", ["b", "", "scales"], ["resized"], mode="linear"),
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        node("If", "yes", "chosen", then_branch=branch("then", 0.5), else_branch=branch("else", 3.0)),
        helper.make_node("Double", ["chosen"], ["d"], domain="local"),
        node("ReduceMean", "d axes", "pooled", keepdims=0),
        node("Shape", "pooled", "shape"),
        node("ConstantOfShape", "shape", "zeros"),
        node("Equal", "pooled masked", "hidden"),
        node("Cast", "hidden", "as_number", to=FLOAT),
        node("Add", "pooled as_number", "added"),
        node("Add", "added zeros", "kept"),
        node("Sub", "kept kept", "nothing"),
        node("Add", "nothing epsilon", "little"),
        node("Div", "little little", "one"),  # not 0 / 0
        node("Mul", "kept one", "features"),
    ]
    function = helper.make_function("local", "Double", ["x"], ["y"], doubled, [helper.make_opsetid("", 20)])
    return model_of(nodes, functions=[function])


def run(content: bytes, images: NDArray[Any] = IMAGES) -> NDArray[Any]:
    """By the definition of ONNX: every operator of a fp16 network rounds to fp16."""
    (features,) = ReferenceEvaluator(ModelProto.FromString(content)).run(None, {"pixel_values": images})
    return np.asarray(features)


def run_fast(content: bytes) -> NDArray[Any]:
    import onnxruntime

    (features,) = onnxruntime.InferenceSession(content).run(None, {"pixel_values": IMAGES})
    return np.asarray(features)


def test_the_converted_network_gives_the_same_features() -> None:
    content = network()
    converted = convert_to_float16(content)
    onnx.checker.check_model(ModelProto.FromString(converted), full_check=True)
    expected = run(content)
    for features in (run(converted), run_fast(converted)):
        assert features.dtype == np.float32
        assert cosine(features, expected).min() > 0.99999
        np.testing.assert_allclose(features, expected, rtol=0.02, atol=0.02)
    assert not np.array_equal(run(converted), expected)


def test_only_weights_that_are_read_remain_and_all_are_half() -> None:
    graph = ModelProto.FromString(convert_to_float16(network())).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {name for name, kind in kinds.items() if kind == FLOAT} == {"scales"}
    assert not {"mean", "variance"} & set(kinds)
    ends = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert ends == {"pixel_values": FLOAT, "features": FLOAT}


def test_float16_ends_become_float32() -> None:
    nodes = [
        node("Cast", "pixel_values", "x", to=FLOAT),
        node("Conv", "x conv", "c"),
        node("ReduceMean", "c axes", "m", keepdims=0),
        node("Cast", "m", "features", to=HALF),
    ]
    content = model_of(nodes, HALF)
    changed = with_float32_ends(content)
    onnx.checker.check_model(ModelProto.FromString(changed), full_check=True)
    expected = run(content, IMAGES.astype(np.float16)).astype(np.float32)
    assert np.array_equal(run(changed), expected)
    assert np.array_equal(run(convert_to_float16(content)).round(1), expected.round(1))
    assert with_float32_ends(changed) is changed


def test_the_built_in_model_is_converted_as_onnx_runtime_does_it() -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    content = builtin_model().read_onnx("fp32")
    theirs = convert_float_to_float16(ModelProto.FromString(content), keep_io_types=True).SerializeToString()
    images = np.random.default_rng(2).normal(size=(4, *built_in.SHAPE[1:])).astype(np.float32)
    import onnxruntime

    mine, other, exact = (
        onnxruntime.InferenceSession(network).run(None, {"pixel_values": images})[0]
        for network in (convert_to_float16(content), theirs, content)
    )
    assert cosine(mine, other).min() > 0.9999
    assert cosine(mine, exact).min() > 0.9999


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has no graph"),
        (b"junk", "damaged"),
        (network()[:-3], "damaged"),
        (builtin_model().read_onnx("int8"), "it is quantised"),
    ],
)
def test_what_cannot_be_converted_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        convert_to_float16(content)


def test_a_weight_beyond_fp16_is_named() -> None:
    model = ModelProto.FromString(network())
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "conv")
    weight.CopyFrom(numpy_helper.from_array(WEIGHTS["conv"] * 1e6, "conv"))
    with pytest.raises(ValueError, match=r"conv has the value 2\.33e\+06; fp16 ends at 65504"):
        convert_to_float16(model.SerializeToString())


def test_weights_in_fields_of_numbers_are_read_too() -> None:
    """As some exporters write them, in place of raw bytes."""
    model = ModelProto.FromString(network())
    for tensor in model.graph.initializer:
        if tensor.data_type == FLOAT:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, FLOAT, values.shape, values.ravel()))
    assert not any(tensor.raw_data for tensor in model.graph.initializer if tensor.data_type == FLOAT)
    assert np.array_equal(run(convert_to_float16(model.SerializeToString())), run(convert_to_float16(network())))


def test_graphs_that_lie_too_deep_and_nodes_without_outputs_are_refused() -> None:
    graph = b""
    for _ in range(400):  # the package onnx writes no more than 100
        graph = Message.of({1: [Message.of({4: ["If"], 5: [Message.of({6: [graph]})]})]}).encode()
    with pytest.raises(ValueError, match="too deep"):
        convert_to_float16(Message.of({7: [graph]}).encode())
    model = ModelProto.FromString(network())
    del model.graph.node[1].output[:]
    with pytest.raises(ValueError, match="a node or tensor is incomplete"):
        convert_to_float16(model.SerializeToString())
