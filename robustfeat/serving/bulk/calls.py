"""Defines `robustfeat.embed`, bulk embedding in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from robustfeat.errors import InputError
from robustfeat.serving.bulk.embedding import EmbeddingResult, embed_files, require_on_error
from robustfeat.serving.bulk.job import Places
from robustfeat.serving.engines.options import MAX_PIXELS, RunOptions
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.serving.inputs.remote import is_remote

__all__ = ["embed"]


def embed(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] = "builtin",
    revision: str | None = None,
    config_hash: str | None = None,
    precision: str = "fp32",
    engine: str = "auto",
    device: str = "auto",
    decoding: str = "exact",
    max_pixels: int = MAX_PIXELS,
    pooling: str = "auto",
    threads: int | None = None,
    workers: int | None = None,
    batch_size: int | None = None,
    on_error: str = "nan",
    restart: bool = False,
    append: bool = False,
    sync: bool = False,
    rows_per_file: int | None = None,
    match: str | Sequence[str] = (),
    quiet: bool = False,
) -> EmbeddingResult:
    """Embeds images into a file of features, one float32 row per image.

    Beside `out` it writes NAME.index.jsonl (the path, hash and error of each row) and NAME.meta.json (the model of the
    features). If a call is killed, repeat it: it resumes and produces byte-identical files.

    Args:
        inputs: a folder, an image, a glob, FILE.tar, FILE.parquet or FILE.parquet:COLUMN, or several of them; each may
            also be a URL such as s3://bucket/photos.
        out: a .npy, .parquet or .safetensors file, or a folder of them (`feats/`, `feats.parquet/`); or its URL.
        model: `builtin`, a model folder, or ORG/NAME on the Hub.
        revision: a branch, tag or commit on the Hub; main by default.
        config_hash: the expected config hash, which pins all files; `robustfeat info` prints it.
        precision: fp32; fp16, meant for GPUs; int8 if the model has it; bf16 with OpenVINO on some processors.
        engine: auto, onnxruntime, openvino or tensorrt.
        device: auto, cpu or cuda.
        decoding: exact, or scaled, which decodes large JPEGs smaller: faster, with slightly different features.
        max_pixels: largest accepted image; decoding takes up to 24 bytes per pixel.
        pooling: of a transformers model's output: auto (by the model's type), embeds, pooler, cls or mean.
        threads: number of processors for the model; by default all that the cgroup allows.
        workers: number of decoder processes; by default one per processor.
        batch_size: images per batch; by default set by the model's input size.
        on_error: `nan` for a row of NaN per image that fails, or `stop` at the first one.
        restart: discard what an unfinished call left, and replace features of another model.
        append: add the inputs that `out` does not hold yet, by path.
        sync: make `out` match `inputs`: drop rows of removed files, and embed only new images.
        rows_per_file: rows per file if `out` is a folder; 1,048,576 by default.
        match: patterns such as `*.jpg` that choose files of folders and archives by name instead of suffix.
        quiet: hide progress.

    Returns:
        The names of the three files, and the number of images, failures and skipped files.

    Raises:
        InputError: an input is missing, `out` cannot be written or continued, or an image failed with `on_error=stop`.
        ModelFolderError, HubError, EngineError: the model cannot be loaded; see `FeatureExtractor.from_pretrained`.
        ValueError: `on_error` has another value.
    """
    places, target = _require(inputs, out, on_error)
    run = RunOptions(precision, engine, device, decoding, threads, max_pixels=max_pixels)
    options = replace(run, revision=revision, config_hash=config_hash, pooling=pooling).for_throughput()
    extractor = FeatureExtractor.load(model, options)
    scratch = None if is_remote(target) else Path(target).parent
    with list_inputs(places, match=[match] if isinstance(match, str) else match, folder=scratch) as found:
        return embed_files(
            extractor,
            found,
            target,
            batch_size=batch_size,
            workers=workers,
            on_error=on_error,
            restart=restart,
            append=append,
            sync=sync,
            rows_per_file=rows_per_file,
            quiet=quiet,
        )


def _require(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], on_error: str
) -> tuple[list[str], str]:
    """Converts inputs and output to text, and refuses wrong arguments before the model is loaded."""
    require_on_error(on_error)
    target = os.fspath(out)
    Places.of(target)
    places = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    if not places:
        raise InputError("got none", argument="inputs", fix="name at least one folder or image")
    return [os.fspath(place) for place in places], target
