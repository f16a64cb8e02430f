"""Quantises a feature network's ONNX file to int8, and chooses the layers by the features. Loads no PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization.shape_inference import quant_pre_process

from robustfeat.errors import EngineError, InputError, ModelFolderError, first_line
from robustfeat.files import reserve_space
from robustfeat.hub.preprocessing import Preprocessing, normalise
from robustfeat.progress import Progress
from robustfeat.serving.engines.engine import open_engine
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.verify import MIN_COSINE, cosine
from robustfeat.training.export.int8.graph import Int8Layer, write_graph
from robustfeat.training.export.int8.layers import Layer, find_layers
from robustfeat.training.export.int8.observation import observe_inputs, observe_ranges
from robustfeat.training.export.int8.rounding import round_by_inputs, round_to_nearest
from robustfeat.training.export.stamp import quiet as without_chatter
from robustfeat.training.export.stamp import raise_of_the_system, stamp_onnx

__all__ = ["Golden", "Int8Shares", "Int8UnfitError", "quantize_onnx"]

_PIXELS = 2**20
"""Pixels of a batch: sixteen images of 224 px, and few enough of the largest ones for their activations."""

_SCRATCH_BYTES = 2**20
_MOST_IMAGES = 32
_MARGIN = 0.002
"""Engines and processors round differently: an export asks for this much more than loading does."""

_LEAST_SHARE = 0.75
"""With a third of its multiply-adds in fp32, MobileNetV3 in int8 was slower than without int8."""

_MAIN, _OTHERS = "onnxruntime", ("openvino",)


class Int8UnfitError(Exception):
    """A network cannot get an int8 file. The message says why."""


@dataclass(frozen=True)
class Golden:
    """The features that a network must reproduce.

    Attributes:
        inputs: (n, 3, S, S) float32.
        features: (n, D) float32.
    """

    inputs: NDArray[np.float32]
    features: NDArray[np.float32]


@dataclass(frozen=True)
class Int8Shares:
    """How much of an int8 file is int8.

    Attributes:
        layers: layers in int8.
        of: convolutions and products with constant matrices in the network.
        multiply_adds: the share of the multiply-adds of these layers that is int8, from 0 to 1.
        kept: the weights of the layers that stay in floating point, the most sensitive first.
    """

    layers: int
    of: int
    multiply_adds: float
    kept: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The entry in config.json."""
        return {**asdict(self), "multiply_adds": round(self.multiply_adds, 4), "kept": list(self.kept)}


def quantize_onnx(
    source: Path,
    golden: Golden,
    calibration: Sequence[NDArray[np.uint8]],
    contract: Preprocessing,
    target: Path,
    *,
    quiet: bool = True,
) -> Int8Shares:
    """Writes a static int8 (QDQ) copy of a network, whose features stay near those of the golden images.

    Activations have 8 bits without a sign and one range per tensor. Weights have 8 bits with a sign and one scale per
    output; they are rounded one after the other, so that each makes up for the errors of those before it, and biases
    take what is left in the mean. Where the features still move too far, the layers that move them most stay in
    floating point.

    Args:
        source: the fp32 file.
        golden: the features that the file must give.
        calibration: squares (S, S, 3) of further real images, which widen the ranges.
        contract: how squares become the network's input.
        target: the file to write.
        quiet: hide progress.

    Raises:
        InputError: there is no room for temporary files.
        Int8UnfitError: this cannot be done, or would leave less than three quarters of the network in int8.
    """
    _require_scratch(source)
    try:
        with without_chatter():
            model = _prepared(source)
            layers = find_layers(model)
            if not layers:
                raise Int8UnfitError("since it has no convolution or matrix product with constant weights")
            ranges, multiply_adds = observe_ranges(model, layers, _batches(golden, calibration, contract))
            some = normalise(np.stack(calibration[:_MOST_IMAGES]), contract) if calibration else golden.inputs[:0]
            images = np.concatenate([golden.inputs, some])[:_MOST_IMAGES]
            forms = _forms(model, layers, images, quiet=quiet)
            draft = _Draft(model, layers, forms, ranges, multiply_adds, golden, quiet)
            kept = _choose_kept(draft, [_MAIN])
            others = _able(model, golden)
            if draft.cosine(kept, others) < MIN_COSINE["int8"]:
                kept = _choose_kept(draft, (_MAIN, *others))
            result = draft.graph(kept)
            stamp_onnx(result, contract)
    except Int8UnfitError:
        raise
    except Exception as exc:  # neither onnx's nor ONNX Runtime's errors share a base class
        raise_of_the_system(exc)
        raise Int8UnfitError(f"since it cannot be quantised ({first_line(exc)})") from exc
    onnx.save(result, target)
    return Int8Shares(len(layers) - len(kept), len(layers), draft.share(kept), tuple(_title(layer) for layer in kept))


@dataclass(frozen=True)
class _Draft:
    """A network with everything that its int8 form needs, but the choice of the layers."""

    model: onnx.ModelProto
    layers: Sequence[Layer]
    forms: dict[str, Int8Layer]
    ranges: dict[str, tuple[float, float]]
    multiply_adds: dict[str, int]
    golden: Golden
    quiet: bool

    def graph(self, kept: Sequence[Layer]) -> onnx.ModelProto:
        """The network with all layers but these in int8."""
        names = {layer.name for layer in kept}
        forms = [self.forms[layer.name] for layer in self.layers if layer.name not in names]
        return write_graph(self.model, forms, kept, self.ranges)

    def cosine(self, kept: Sequence[Layer], engines: Sequence[str]) -> float:
        """The smallest one over the golden images and these engines."""
        content = self.graph(kept).SerializeToString()
        return min((_least_cosine(content, self.golden, engine) for engine in engines), default=1.0)

    def share(self, kept: Sequence[Layer]) -> float:
        """The int8 share of the multiply-adds."""
        total = sum(self.multiply_adds.values())
        return 1 - sum(self.multiply_adds[layer.name] for layer in kept) / total


def _able(model: onnx.ModelProto, golden: Golden) -> list[str]:
    """The further engines that are installed and run the network in fp32: they must run its int8 file, too."""
    content = model.SerializeToString()
    return [name for name in _OTHERS if _least_cosine(content, golden, name) >= MIN_COSINE["fp32"]]


def _least_cosine(content: bytes, golden: Golden, engine: str) -> float:
    """The smallest cosine of an ONNX file over the golden images; -1 if it cannot run, or is not finite."""
    try:
        opened = open_engine(Path("model.onnx"), content, RunOptions(engine=engine, device="cpu"))
        features = np.concatenate([opened.run(part) for part in _parts(golden.inputs)])
    except (EngineError, ModelFolderError):
        return -1.0
    return float(np.nan_to_num(cosine(features, golden.features), nan=-1.0).min())


def _choose_kept(draft: _Draft, engines: Sequence[str]) -> list[Layer]:
    """The layers that stay in floating point: as few of the most sensitive ones as the golden images require."""
    needed = MIN_COSINE["int8"] + _MARGIN
    fixed = [layer for layer in draft.layers if layer.misread]
    if draft.share(fixed) < _LEAST_SHARE:
        share = 1 - draft.share(fixed)
        raise Int8UnfitError(f"since OpenVINO would misread {len(fixed)} layers, {share:.0%} of the multiply-adds")
    if (whole := draft.cosine(fixed, engines)) >= needed:
        return fixed
    order = [*fixed, *_by_sensitivity(draft, fixed, engines)]
    most = max(count for count in range(len(order) + 1) if draft.share(order[:count]) >= _LEAST_SHARE)
    tried = {len(fixed): whole}

    def suffices(count: int) -> bool:
        if count not in tried:
            tried[count] = draft.cosine(order[:count], engines)
        return tried[count] >= needed

    below, enough = len(fixed), min(len(fixed) + 1, most)
    while enough < most and not suffices(enough):
        below, enough = enough, 2 * enough
    enough = min(enough, most)
    if not suffices(enough):
        raise Int8UnfitError(
            f"which would change its features too much: cosine {whole:.4f} on a golden image, and {tried[enough]:.4f} "
            f"with the {enough} most sensitive of {len(order)} layers in floating point, "
            f"{1 - draft.share(order[:enough]):.0%} of the multiply-adds; {needed} needed"
        )
    while enough - below > 1:
        middle = (below + enough) // 2
        below, enough = (below, middle) if suffices(middle) else (middle, enough)
    return order[:enough]


def _by_sensitivity(draft: _Draft, without: Sequence[Layer], engines: Sequence[str]) -> list[Layer]:
    """The other layers, sorted by how far the golden features move when only that layer is in int8."""
    layers = [layer for layer in draft.layers if layer not in without]
    progress = Progress("int8: how far each layer moves the features", len(layers), "layers", quiet=draft.quiet)
    cosines = {}
    for layer in layers:
        cosines[layer.name] = draft.cosine([other for other in draft.layers if other is not layer], engines)
        progress.advance(1)
    progress.finish()
    return sorted(layers, key=lambda layer: cosines[layer.name])


def _forms(
    model: onnx.ModelProto, layers: Sequence[Layer], images: NDArray[np.float32], *, quiet: bool
) -> dict[str, Int8Layer]:
    """The int8 form of each layer, by its name."""
    progress = Progress("int8: weights", len(layers), "layers", quiet=quiet)
    forms = {}
    for layer, inputs in observe_inputs(model, layers, images):
        if inputs.moments is None:
            rounded = round_to_nearest(layer.weights)
        else:
            rounded = round_by_inputs(layer.weights, inputs.moments)
        taken = ((layer.weights - rounded.weights) * inputs.mean[:, None, :]).sum(2).reshape(-1)
        forms[layer.name] = Int8Layer(layer, rounded, layer.biases + taken)
        progress.advance(1)
    progress.finish()
    return forms


def _require_scratch(source: Path) -> None:
    """Checks the room for the temporary files of `_prepared`: the network twice.

    On a full disk, the writers of onnx and ONNX Runtime leave half a file and report nothing.

    Raises:
        InputError: there is too little.
    """
    size = 2 * source.stat().st_size + _SCRATCH_BYTES
    try:
        with tempfile.TemporaryFile() as file:
            reserve_space(file, size)
    except OSError as exc:
        raise InputError(
            f"{tempfile.gettempdir()}: has no room for {size / 1e6:,.0f} MB of temporary files ({exc.strerror or exc})",
            fix="free space, or set TMPDIR to another folder",
        ) from exc


def _prepared(source: Path) -> onnx.ModelProto:
    """The network with its shapes, with BatchNorm folded into the convolutions, and with a name for each node."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "prepared.onnx")
        quant_pre_process(str(source), str(file), skip_symbolic_shape=True)
        model = onnx.load(file)
    if any(entry.domain in {"", "ai.onnx"} and entry.version < 13 for entry in model.opset_import):
        model = onnx.version_converter.convert_version(model, 13)  # opset 13 has integers with a scale per output
    for place, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{place}"
    return model


def _batches(
    golden: Golden, calibration: Sequence[NDArray[np.uint8]], contract: Preprocessing
) -> Iterator[NDArray[np.float32]]:
    """Adds the golden images to the others: some have plain backgrounds, which give the largest activations."""
    yield from _parts(golden.inputs)
    size = _batch_size(contract.image_size)
    for first in range(0, len(calibration), size):
        yield normalise(np.stack(calibration[first : first + size]), contract)


def _parts(inputs: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """(n, 3, S, S) in batches."""
    size = _batch_size(inputs.shape[-1])
    for first in range(0, len(inputs), size):
        yield inputs[first : first + size]


def _batch_size(side: int) -> int:
    return max(1, min(16, _PIXELS // side**2))


def _title(layer: Layer) -> str:
    """The name of the layer's weights in the network."""
    return layer.weight.removeprefix("ConvBnFusion_W_").removesuffix(".weight")
