"""Writes a model repository for Triton Inference Server and OpenVINO Model Server.

    REPOSITORY/
      NAME/config.pbtxt       for Triton: tensors, batches, warm-up, and the preprocessing as a parameter
      NAME/1/model.onnx       the network: `pixel_values` to features
      openvino.json           for OpenVINO Model Server: all models of the repository

Both servers only run networks. Clients decode and prepare the images as the parameter `preprocessing` of config.pbtxt
says (docs/triton.md has a client).

Source: model_config.proto of triton-inference-server/common; parameters of openvinotoolkit/model_server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustfeat.errors import EngineError, InputError
from robustfeat.files import new_file, new_folder
from robustfeat.hub.folder import weights_sha256
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.extractor import FeatureExtractor, default_batch_size

__all__ = ["CONFIG", "NETWORK", "OPENVINO", "RepositoryOptions", "check_name", "write_repository"]

CONFIG = "config.pbtxt"
NETWORK = "1/model.onnx"
OPENVINO = "openvino.json"


@dataclass(frozen=True)
class RepositoryOptions:
    """How Triton runs the network.

    Attributes:
        run: precision, engine (onnxruntime, or tensorrt inside ONNX Runtime), device and threads.
        instances: number of copies of the network, per GPU or per machine.
        batch_size: largest batch; None for the default of the model and device.
        batch_delay_us: longest wait of a request for others, in microseconds.
        max_queue: most waiting requests. Triton refuses more.
        timeout_s: longest wait of a request before it is refused.
    """

    run: RunOptions
    instances: int = 1
    batch_size: int | None = None
    batch_delay_us: int = 0
    max_queue: int = 256
    timeout_s: float = 30


def check_name(name: str) -> str:
    """Checks a name for the model's folder and its URLs.

    Raises:
        InputError: the name has other characters.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}", name):
        raise InputError(
            "expected letters, digits, '.', '_' and '-', a letter or digit first", argument="name", value=name
        )
    return name


def write_repository(extractor: FeatureExtractor, out: Path, name: str, options: RepositoryOptions) -> Path:
    """Writes `out`/`name`, and lists it in `out`/openvino.json.

    Args:
        extractor: the model, opened on this machine. The servers get its network.
        out: the repository. Other models in it stay.
        name: name of the model in the repository.
        options: options for config.pbtxt.

    Returns:
        The model's folder.

    Raises:
        EngineError: the network does not output features, or Triton cannot run it as requested.
        InputError: `out`/`name` exists, another program wrote openvino.json, or the file system refuses.
        ModelFolderError: a file was altered.
    """
    options.run.choose_engine()  # refuses options that no machine can run
    text = model_config(extractor, name, options)
    _read_openvino(out / OPENVINO)
    with new_folder(out / name) as folder:
        (folder / CONFIG).write_text(text, "utf-8")
        (folder / NETWORK).parent.mkdir()
        (folder / NETWORK).write_bytes(extractor.folder.read_onnx(options.run.stored_precision))
    _list_for_openvino(out, name)
    return out / name


def model_config(extractor: FeatureExtractor, name: str, options: RepositoryOptions) -> str:
    """The content of config.pbtxt: a `ModelConfig` in protobuf's text format.

    Raises:
        EngineError: the network does not output features.
    """
    output = _direct_output(extractor)
    side, run = extractor.config.preprocessing.image_size, options.run
    batch = options.batch_size or default_batch_size(side, "cuda" if run.requires_gpu else "cpu")
    config: dict[str, Any] = {
        "name": name,
        "backend": "onnxruntime",
        "max_batch_size": batch,
        "input": [{"name": "pixel_values", "data_type": _Word("TYPE_FP32"), "dims": [3, side, side]}],
        "output": [{"name": output, "data_type": _Word("TYPE_FP32"), "dims": [extractor.feature_size]}],
        "instance_group": [{"count": options.instances, "kind": _Word(_kind(run))}],
        "dynamic_batching": {
            "max_queue_delay_microseconds": options.batch_delay_us,
            "default_queue_policy": {
                "timeout_action": _Word("REJECT"),
                "default_timeout_microseconds": round(options.timeout_s * 1e6),
                "max_queue_size": options.max_queue,
            },
        },
        "model_warmup": [_warmup(size, side) for size in sorted({1, batch})],
        "parameters": [
            {"key": key, "value": {"string_value": value}} for key, value in _parameters(extractor, run).items()
        ],
    }
    if run.engine == "tensorrt":
        config["optimization"] = {
            "execution_accelerators": {"gpu_execution_accelerator": [_tensorrt(run, batch, side)]}
        }
    return f"# Written by robustfeat triton.\n{_text_format(config)}"


def _direct_output(extractor: FeatureExtractor) -> str:
    """The name of the network's output with the features.

    Raises:
        EngineError: this package computes the features from the output, and Triton would not.
    """
    pooling = extractor.engine.pooling
    if pooling.name in {None, "embeds"}:
        return pooling.output
    raise EngineError(
        f"{extractor.folder.source}: the network outputs {pooling.output}, not features",
        fix="make a folder whose network does with robustfeat import hf:MODEL",
    )


def _kind(run: RunOptions) -> str:
    """The device of an instance, by Triton's name."""
    return "KIND_GPU" if run.requires_gpu else "KIND_CPU" if run.device == "cpu" else "KIND_AUTO"


def _warmup(batch: int, side: int) -> dict[str, Any]:
    """A batch that Triton runs before the model is ready, since the first batch of a size is slow."""
    tensor = {"data_type": _Word("TYPE_FP32"), "dims": [3, side, side], "zero_data": True}
    return {"name": f"{batch} images", "batch_size": batch, "inputs": {"key": "pixel_values", "value": tensor}}


def _parameters(extractor: FeatureExtractor, run: RunOptions) -> dict[str, str]:
    """Parameters for clients, and the threads of ONNX Runtime, which ignores the others."""
    contract, config = extractor.config.preprocessing, extractor.config
    threads = {"intra_op_thread_count": str(run.threads)} if run.threads else {}
    return {
        "model": config.name,
        "precision": run.precision,
        "preprocessing": json.dumps(contract.to_dict()),
        "preprocessing_hash": contract.hash,
        "weights_sha256": weights_sha256(config.files),
        **threads,
    }


def _tensorrt(run: RunOptions, batch: int, side: int) -> dict[str, Any]:
    """TensorRT inside ONNX Runtime, with one engine for all batch sizes."""
    shapes = {"min": 1, "opt": batch, "max": batch}
    parameters = {
        "precision_mode": run.precision.upper(),
        **{f"trt_profile_{name}_shapes": f"pixel_values:{size}x3x{side}x{side}" for name, size in shapes.items()},
    }
    return {"name": "tensorrt", "parameters": [{"key": key, "value": value} for key, value in parameters.items()]}


class _Word(str):
    """A value of an enumeration, which has no quotation marks."""


def _text_format(message: Mapping[str, Any], indent: str = "") -> str:
    """Renders a message in protobuf's text format, one field per line."""
    lines = []
    for name, value in message.items():
        for one in value if isinstance(value, list) and isinstance(value[0], Mapping) else [value]:
            if isinstance(one, Mapping):
                lines.append(f"{indent}{name} {{\n{_text_format(one, indent + '  ')}{indent}}}\n")
            else:
                text = one if isinstance(one, _Word) else json.dumps(one, ensure_ascii=False)
                lines.append(f"{indent}{name}: {text}\n")
    return "".join(lines)


def _read_openvino(file: Path) -> dict[str, dict[str, Any]]:
    """The models in an openvino.json by name; empty if the file is missing.

    Raises:
        InputError: another program wrote it.
    """
    try:
        entries = json.loads(file.read_bytes())["model_config_list"]
        return {entry["config"]["name"]: entry["config"] for entry in entries}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError) as exc:
        raise InputError(f"{file}: expected a list of models that robustfeat triton wrote", fix="move it away") from exc


def _list_for_openvino(out: Path, name: str) -> None:
    """Adds a model to openvino.json, and removes models whose folders are gone.

    Raises:
        InputError: the file system refuses, or another program wrote the file.
    """
    file = out / OPENVINO
    with new_file(file) as partial:  # another process that adds a model waits, and reads this one's list
        served = {old: config for old, config in _read_openvino(file).items() if (out / old).is_dir()}
        # Otherwise OpenVINO uses bf16 on processors that have it.
        served[name] = {"name": name, "base_path": name, "plugin_config": {"INFERENCE_PRECISION_HINT": "f32"}}
        content = {"model_config_list": [{"config": config} for config in served.values()]}
        partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
