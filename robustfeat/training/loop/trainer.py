"""Training on a CPU, a GPU or several, from the arguments to the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustfeat.errors import InputError, TrainingError
from robustfeat.files import new_file
from robustfeat.progress import remark
from robustfeat.system import available_cpus
from robustfeat.training.concepts import cluster_count
from robustfeat.training.data.batches import explain_worker
from robustfeat.training.data.hub_dataset import is_hub_dataset
from robustfeat.training.loop.arguments import check_arguments
from robustfeat.training.loop.bad_images import BadImages
from robustfeat.training.loop.checkpoint import (
    Checkpoint,
    Position,
    load_checkpoint,
    require_same_concepts,
    require_same_recipe,
)
from robustfeat.training.loop.clustering import cluster_images
from robustfeat.training.loop.curves import draw_curves
from robustfeat.training.loop.distributed import gather_objects, join_group, require_same, together
from robustfeat.training.loop.epochs import EpochLoop
from robustfeat.training.loop.kept_features import keep_features, require_feature_room
from robustfeat.training.loop.preparation import (
    Run,
    choose_device,
    claim_folder,
    fill_cache,
    introduce,
    prepare_run,
    require_cache_room,
)
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.loop.report import open_report
from robustfeat.training.loop.run_folder import BEST_NAME, CURVES_NAME
from robustfeat.training.loop.saving import Saver, restore
from robustfeat.training.loop.signals import stop_on_signal
from robustfeat.training.loop.step import TrainingStep
from robustfeat.training.recipe import RECIPE_NAME, Recipe
from robustfeat.training.start import State, load_start, resolve_start
from robustfeat.training.target import estimate_reference
from robustfeat.training.teacher import resolve_teacher

__all__ = ["TrainingResult", "train"]


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        run: its folder.
        validation_accuracy: share of validation images classified correctly by the last epoch's network (its averaged
            weights where the recipe has `ema`); NaN where labels were not learned.
        bad_images: the images that could not be decoded and were left out.
        stopped: a signal came when nothing was left to train.
        probe_accuracy: accuracy of the recipe's probe after the last epoch; None without a probe.
    """

    run: Path
    validation_accuracy: float
    bad_images: tuple[str, ...]
    stopped: bool = False
    probe_accuracy: float | None = None


def train(
    data: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    cache: str = "auto",
    stream: bool = False,
    target: str | None = None,
    target_model: str = "builtin",
    checkpoint_every_s: float = 300.0,
    quiet: bool = False,
) -> TrainingResult:
    """Trains by `recipe` on `data` into the folder `out`; started by torchrun, together with the other ranks.

    Args:
        data: see `open_training_data`.
        out: gets `checkpoint.pt`, `metrics.jsonl`, `recipe.toml`, `curves.png` and `tensorboard/`; and `best.pt`, where
            the recipe has `best`.
        resume: resume from the checkpoint in `out`. The recipe and the data must be the same.
        device: auto, cpu or cuda.
        workers: processes that decode images; by default one for each processor, at most 16, and 1 for images that a
            cache has decoded.
        threads: processors for the network; by default all that the cgroup allows. Ranks on one machine share both.
        cache: where the squares of `recipe.cache_px` are kept: ram, device (the GPU), a folder, or auto (device or
            ram). Nothing is cached where that is 0.
        target, target_model: images from which this model estimates the recipe's `reference`; see `estimate_reference`.
        stream: read the Parquet files of a dataset of the Hub over the network, each epoch anew.
        checkpoint_every_s: also within an epoch; one is written after each epoch in any case.

    Raises:
        DataError, CheckpointError, InputError: see the messages.
        DivergedError: the loss is no longer finite.
        StoppedError: a signal stopped the run (its state is saved).
    """
    ranks, folder = Ranks.from_environment(), Path(out)
    chosen = choose_device(device, ranks)
    torch.set_num_threads(threads or max(1, available_cpus() // ranks.local_world))
    quiet = quiet or ranks.rank > 0
    with join_group(ranks, chosen):
        with together():
            how: dict[str, Any] = {"resume": resume, "cache": cache, "stream": stream}
            check_arguments(data, recipe, folder, ranks, checkpoint_every_s=checkpoint_every_s, **how)
        with together():
            # A run that resumes needs its start no more.
            recipe, start = (recipe, {}) if resume and recipe.init_sha256 else resolve_start(recipe)
            recipe = resolve_teacher(recipe)
        if target is not None:
            recipe = recipe.replace(reference=_agree_on_reference(target, target_model, recipe, ranks, quiet))
        with _explaining(), together():
            run = prepare_run(
                data, recipe, folder, ranks, chosen, workers=workers, cache=cache, stream=stream, quiet=quiet
            )
            # With clusters, the step's concepts are not known yet.
            clustered = cluster_count(recipe.concepts) is not None
            step = None if clustered else TrainingStep(recipe, run.concepts, chosen, ranks)
            require_cache_room(run)
            require_feature_room(run)
        # Each rank has looked names up for itself, and somebody may have pushed meanwhile.
        of_data = {"data": run.train_set.fingerprint} if is_hub_dataset(data) else {}
        require_same({"init": run.recipe.init_sha256, "teacher": run.recipe.teacher_sha256, **of_data})
        with _explaining(), claim_folder(run, resume=resume):
            return _train_in_folder(run, step, start, data, resume, checkpoint_every_s)


@contextmanager
def _explaining() -> Iterator[None]:
    """Makes errors of the GPU's memory and of decoding processes ones of ours."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise TrainingError(
            "the GPU's memory does not suffice",
            fix="pass a smaller `batch_size`, `precision=bf16`, or another `cache`",
        ) from exc
    except RuntimeError as exc:
        raise explain_worker(exc) from exc


def _train_in_folder(
    run: Run, step: TrainingStep | None, start: State, data: str | Path, resume: bool, checkpoint_every_s: float
) -> TrainingResult:
    """Trains in the run's folder, which this process holds; without a `step`, clusters are its concepts."""
    with together():
        saved = _find_checkpoint(run) if resume else None
    if step is None:
        run = cluster_images(run, saved.clusters if saved else {})
        with together():
            step = TrainingStep(run.recipe, run.concepts, run.device, run.ranks)
    with together():
        if saved is not None:
            require_same_concepts(saved, run.folder, run.concepts)
        elif start:
            _start(step, start, run)
        introduce(run, data)
    with together():
        run = fill_cache(run)
    return _train(keep_features(run), step, saved, checkpoint_every_s)


def _agree_on_reference(target: str, model: str, recipe: Recipe, ranks: Ranks, quiet: bool) -> dict[str, float]:
    """One rank looks at the target's images; all take its numbers."""
    shares: dict[str, float] = {}
    with together():
        if cluster_count(recipe.concepts):
            raise InputError(
                "needs concepts of classes", argument="target", value=target, fix="leave out clusters or the target"
            )
        if ranks.rank == 0:
            shares = estimate_reference(target, recipe.concepts, model, rule=recipe.target_rule, quiet=quiet)
            told = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
            remark(f"q0 of {target}: {told}", quiet=quiet)
    first: dict[str, float] = gather_objects(shares)[0]
    return first


def _start(step: TrainingStep, start: State, run: Run) -> None:
    """Gives the network its first weights."""
    init = run.recipe.init
    new = load_start(step.network, start, init)
    step.take_start()
    start.clear()  # the memory is needed elsewhere
    remark(f"starts from {init}" + (f"; {', '.join(new)} are new" if new else ""), quiet=run.quiet)


def _find_checkpoint(run: Run) -> Checkpoint:
    """The checkpoint to resume from, of the same recipe and data."""
    saved = load_checkpoint(run.folder)
    require_same_recipe(saved, run.folder, run.recipe, run.data_identity)
    return saved


def _train(run: Run, step: TrainingStep, saved: Checkpoint | None, checkpoint_every_s: float) -> TrainingResult:
    """Trains to the end of the recipe, from a checkpoint or from the beginning."""
    step.distribute()
    bad_images = BadImages(saved.bad_images if saved else None)
    position = restore(saved, run, step) if saved else Position()
    saver = Saver(run, step, bad_images, saved)
    if saved is None:
        # At once: a run that is killed before its first epoch ends can then be resumed, too.
        saver.save(position)
    if run.ranks.rank == 0:
        with new_file(run.folder / RECIPE_NAME) as partial:
            partial.write_text(run.recipe.to_toml(), "utf-8")
    with open_report(run, step.objective, position) as report, stop_on_signal() as stop:
        loop = EpochLoop(run, step, position, report, saver, bad_images, stop, checkpoint_every_s)
        accuracy = loop.train()
    if run.ranks.rank == 0:
        draw_curves(run.folder, run.concepts.names)
        if saver.best:
            remark(f"{run.folder / BEST_NAME} is of epoch {saver.best['epoch']}", quiet=run.quiet)
        remark(f"{run.folder / CURVES_NAME} shows loss, accuracy and the path of q", quiet=run.quiet)
    return TrainingResult(run.folder, accuracy, bad_images.all(), stop.requested, loop.probe_accuracy)
