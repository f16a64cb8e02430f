"""Model folders from ONNX files of any vision network. Loads no PyTorch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from robustfeat.errors import InputError
from robustfeat.hub.catalog import resolve_model
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.folder import ONNX
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.progress import remark
from robustfeat.serving.engines.options import AUTO, ENGINES
from robustfeat.serving.engines.pooling import choose_pooling
from robustfeat.training.export.assembly import ExportReport, FolderParts, assemble_folder
from robustfeat.training.export.calibration import import_images
from robustfeat.training.export.graph_adapting import AdaptedGraph, adapt_graph
from robustfeat.training.export.graph_pooling import POOLINGS
from robustfeat.training.export.graph_reading import load_graph, output_shapes, run_graph
from robustfeat.training.export.provenance import imported
from robustfeat.training.export.repository import Repository
from robustfeat.training.export.stamp import stamp_onnx

__all__ = ["import_onnx", "import_onnx_layout"]

_MODEL = re.compile(r"model(_\w+)?")

_QUANTISED = {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "MatMulInteger", "ConvInteger", "MatMulNBits"}


def import_onnx(
    source: str | Path,
    out: str | Path,
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    crop_mode: str | None = None,
    output: str | None = None,
    pooling: str | None = None,
    name: str | None = None,
    calibration: str | Path | None = None,
    int8: bool = True,
    terms: str | None = None,
    license_id: str | None = None,
    quiet: bool = True,
) -> ExportReport:
    """Makes a model folder of a vision network's ONNX file. The golden features are ONNX Runtime's, in fp32.

    Args:
        source: the file. Its external data must be beside it.
        out: the folder to make.
        image_size: S; needed where the network takes images of any size.
        mean, std: one number, or one per channel, for values in [0, 1]. Needed unless the network takes uint8.
        crop_pct, interpolation, crop_mode: settings of the preprocessing contract; by default 1, bilinear and center.
        output: the tensor that becomes the features; needed where the network has several outputs.
        pooling: cls or mean, for an output of tokens or a map.
        name: the model's name; by default the file's, or its folder's for a file called model.
        calibration: a folder of images for int8; besides the golden images.
        int8: also write onnx/model_int8.onnx.
        terms: under which terms the weights may be used, for the card.
        license_id: the Hub's name of a license.
        quiet: say nothing of the steps on stderr.

    Raises:
        InputError: the file cannot be used so. The message says what was found and what to pass.
        ExportError: an engine disagrees with ONNX Runtime; nothing is left behind.
    """
    file = Path(source)
    model, sha256 = load_graph(file)
    adapted = adapt_graph(model, str(file), image_size=image_size, output=output, pooling=pooling)
    settings = {"crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": crop_mode}
    mean, std = _normalisation(adapted, file, mean, std)
    try:
        contract = Preprocessing(
            adapted.image_size,
            mean=_three(mean),
            std=_three(std),
            **{key: value for key, value in settings.items() if value is not None},  # type: ignore[arg-type]
        )
    except ValueError as exc:
        raise InputError(f"{file}: {exc}") from exc
    _say_doubts(adapted, file, output)
    said = f"{file.name}, output {adapted.output}" + (f", pooling {adapted.pooling}" if adapted.pooling else "")
    origin = imported(said, {"sha256": sha256}, terms=terms, license_id=license_id)
    if int8 and _is_quantised(adapted.model):
        remark(f"{file}: is quantised, so the folder gets no int8 file of its own")
        int8 = False
    images = import_images(calibration, contract, int8=int8)
    config = _config(name or _label(file), f"onnx:{_label(file)}", adapted, contract, origin)
    return _write_folder(adapted, config, out, calibration=images, quiet=quiet)


def _label(file: Path) -> str:
    """The file's name, or its folder's where the file is called model.onnx, model_int8.onnx and the like."""
    if not _MODEL.fullmatch(file.stem):
        return file.stem
    folder = file.absolute().parent
    return (folder.parent if folder.name == "onnx" else folder).name or file.stem


def _config(
    name: str, architecture: str, adapted: AdaptedGraph, contract: Preprocessing, provenance: dict[str, Any]
) -> ModelConfig:
    return ModelConfig(
        name=name,
        architecture=architecture,
        feature_size=adapted.feature_size,
        num_classes=0,
        preprocessing=contract,
        first_conv="",
        classifier="",
        provenance=provenance,
    )


def _write_folder(
    adapted: AdaptedGraph,
    config: ModelConfig,
    out: str | Path,
    *,
    calibration: Sequence[NDArray[np.uint8]] | None,
    quiet: bool,
) -> ExportReport:
    """The folder of a graph, with the features that ONNX Runtime gives for the golden images.

    Args:
        adapted: the graph.
        config: without `files`.
        out: the folder to make.
        calibration: squares (S, S, 3) for int8, besides the golden images; None leaves it out.
        quiet: say nothing of the steps on stderr.

    Raises:
        ExportError: an engine disagrees with ONNX Runtime; nothing is left behind.
    """

    def write(path: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        stamp_onnx(adapted.model, config.preprocessing)
        remark(f"{config.name}: writing {ONNX['fp32']}; ONNX Runtime embeds the golden images", quiet=quiet)
        (path / ONNX["fp32"]).parent.mkdir()
        (path / ONNX["fp32"]).write_bytes(adapted.model.SerializeToString())
        (features,) = run_graph(adapted.model, [inputs], config.name)
        return features

    parts = FolderParts(config, write, reference="ONNX Runtime", engines=ENGINES)
    return assemble_folder(parts, out, calibration=calibration, quiet=quiet)


def import_onnx_layout(
    repository: Repository,
    out: str | Path,
    *,
    pooling: str | None = None,
    name: str | None = None,
    calibration: str | Path | None = None,
    int8: bool = True,
    terms: str | None = None,
    license_id: str | None = None,
    quiet: bool = True,
) -> ExportReport:
    """Makes a model folder of a model in the layout of Optimum and transformers.js, of its ONNX file in fp32.

    Args:
        repository: the repository of the model.
        out: the folder to make.
        pooling: a way of `hub.outputs.POOLED`; by default the usual one for the model type.
        name: the model's name; by default the repository's.
        calibration, int8, terms: see `import_onnx`.
        license_id: the Hub's name of a license; by default from the model's card.
        quiet: say nothing of the steps on stderr.

    Raises:
        ModelFolderError, EngineError, InputError: the model cannot be used so.
        ExportError: an engine disagrees with ONNX Runtime; nothing is left behind.
    """
    source = repository.source
    folder = resolve_model(
        repository.repo or repository.path,
        revision=repository.commit,
        access=repository.access if repository.repo else None,
    )
    model = onnx.load_model_from_string(folder.read_onnx("fp32"))
    shapes = output_shapes(model, source)
    chosen = choose_pooling(pooling or AUTO, folder.config.outputs, shapes, Path(source))
    contract = folder.config.preprocessing
    adapted = adapt_graph(
        model,
        source,
        image_size=contract.image_size,
        output=chosen.output,
        pooling=chosen.name if chosen.name in POOLINGS else None,
        prefix=chosen.prefix,
    )
    license_id = license_id or (None if terms else repository.license())
    said = f"{repository.origin}, output {chosen.output}, pooling {chosen.name}"
    origin = imported(said, {"revision": repository.commit}, terms=terms, license_id=license_id)
    images = import_images(calibration, contract, int8=int8)
    config = _config(name or repository.label, f"onnx:{repository.model_type}", adapted, contract, origin)
    return _write_folder(adapted, config, out, calibration=images, quiet=quiet)


def _normalisation(
    adapted: AdaptedGraph, file: Path, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float], Sequence[float]]:
    """The given mean and standard deviation, or values that do not change the pixels of a uint8 input."""
    if adapted.takes_bytes:
        for name, value in (("mean", mean), ("std", std)):
            if value is not None:
                raise InputError(
                    f"{file} takes uint8, so that it normalises pixels itself",
                    argument=name,
                    fix="leave `mean` and `std` out",
                )
        return (0.0,), (1 / 255,)
    if mean is None or std is None:
        inside = f" (it begins with {', '.join(adapted.normalises)}, which may do so)" if adapted.normalises else ""
        raise InputError(
            f"{file}: does not say how pixels are normalised{inside}",
            fix="pass `mean` and `std` for values from 0 to 1: ImageNet's are 0.485,0.456,0.406 and 0.229,0.224,0.225; "
            "a mean of 0 gives values from 0 to 1 with a std of 1, and from 0 to 255 with a std of 1/255",
        )
    return mean, std


def _three(values: Sequence[float]) -> Any:
    return tuple(values) * 3 if len(values) == 1 else tuple(values)


def _say_doubts(adapted: AdaptedGraph, file: Path, output: str | None) -> None:
    """Lines on stderr about what only a user can know."""
    if adapted.classifier_input is not None and output is None:
        remark(
            f"{file}: the features are {adapted.output}, which a linear layer gives; if that is the classifier, name "
            f"its input {adapted.classifier_input} as the output"
        )
    if adapted.normalises and not adapted.takes_bytes:
        remark(
            f"{file}: the network begins with {', '.join(adapted.normalises)}, which may normalise pixels, too, beside "
            "mean and std"
        )


def _is_quantised(model: onnx.ModelProto) -> bool:
    return any(node.op_type in _QUANTISED for node in model.graph.node)
