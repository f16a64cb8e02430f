"""`robustfeat triton`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from robustfeat.cli.extraction import ABOVE_ZERO, Number, pin_options
from robustfeat.cli.rendering import Command
from robustfeat.serving.engines.options import AUTO, DEVICES, RunOptions


@click.command("triton", cls=Command, short_help="Write a model repository for Triton Inference Server.")
@click.argument("model", default="builtin")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="REPOSITORY",
    help="Folder of the model repository. Other models in it stay.",
)
@click.option("--name", help="Name of the model in the repository.  [default: MODEL's name]")
@pin_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="Precision of the network. fp16 is for GPUs, int8 for processors.",
)
@click.option(
    "--engine",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="Engine of Triton's ONNX Runtime backend. tensorrt needs an NVIDIA GPU on the serving machine.",
)
@click.option(
    "--device",
    type=click.Choice([AUTO, *DEVICES]),
    default=AUTO,
    show_default=True,
    help="Device on the serving machine. auto uses its GPUs if there are any.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Number of processors per instance.  [default: all]")
@click.option(
    "--instances",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Number of copies of the network: per GPU, or in total on processors.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 1024),
    help="Largest batch, in images.  [default: set by the model's input size]",
)
@click.option(
    "--batch-delay",
    type=Number(min=0, max=10_000),
    default=0,
    show_default=True,
    metavar="MS",
    help="Longest wait of a request for others to join its batch, in milliseconds.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Largest number of waiting requests.",
)
@click.option(
    "--timeout",
    type=ABOVE_ZERO,
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="Longest wait of a request before it is refused.",
)
def command(
    model: str,
    out: Path,
    name: str | None,
    revision: str | None,
    config_hash: str | None,
    precision: str,
    engine: str,
    device: str,
    threads: int | None,
    instances: int,
    batch_size: int | None,
    batch_delay: float,
    max_queue: int,
    timeout: float,
) -> None:
    """Writes MODEL (default: builtin) to the model repository REPOSITORY for NVIDIA Triton Inference Server.

    Triton runs the network with dynamic batches. Clients send prepared images as `pixel_values`. OpenVINO Model Server
    reads the same repository by its openvino.json. To accept image files, use `robustfeat serve`.
    """
    from robustfeat.serving.extractor import FeatureExtractor
    from robustfeat.serving.triton import CONFIG, OPENVINO, RepositoryOptions, check_name, write_repository

    served = check_name(name or ("robustfeat" if model == "builtin" else Path(model).absolute().name))
    options = RepositoryOptions(
        run=RunOptions(precision=precision, engine=engine, device=device, threads=threads),
        instances=instances,
        batch_size=batch_size,
        batch_delay_us=round(batch_delay * 1000),
        max_queue=max_queue,
        timeout_s=timeout,
    )
    # Loading runs the network once on this processor, before it is served elsewhere.
    here = RunOptions(precision, "onnxruntime", "cpu", revision=revision, config_hash=config_hash)
    folder = write_repository(FeatureExtractor.load(model, here), out, served, options)
    paths = {"model": folder, "config": folder / CONFIG, "openvino": out / OPENVINO}
    click.echo(json.dumps({"name": served, **{key: str(path) for key, path in paths.items()}}))
