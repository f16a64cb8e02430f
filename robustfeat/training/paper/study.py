"""The paper's experiments on somebody's data: what has to be trained, on what, and where it is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustfeat.counts import format_count
from robustfeat.errors import CheckpointError, DataError, DivergedError, InputError, StoppedError, TrainingError
from robustfeat.progress import remark
from robustfeat.serving.inputs.sources import printable
from robustfeat.training.concepts import assign_concepts, load_concepts
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import open_splits, open_training_data
from robustfeat.training.evaluation.tasks import Task, draw_images, open_task
from robustfeat.training.loop.checkpoint import changed_key, load_checkpoint
from robustfeat.training.loop.device import measuring_device
from robustfeat.training.loop.run_folder import CHECKPOINT_NAME
from robustfeat.training.loop.trainer import TrainingResult, train
from robustfeat.training.paper.locks import Locks
from robustfeat.training.paper.scale import WITH_LAMBDA, WITH_TAU, Scale, stretch
from robustfeat.training.paper.subsets import draw_by_concept, same_origin, write_subset
from robustfeat.training.recipe import Recipe

__all__ = ["Machine", "Study"]


@dataclass(frozen=True)
class Machine:
    """The machine that trains runs.

    Attributes:
        device, threads, workers: see `train`.
        quiet: hide progress.
    """

    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    quiet: bool = False


class Study:
    """Data and runs of one report.

    Args:
        folder: the report's; gets `runs/`, `data/` and `locks/`.
        scale: how large everything is.
        benchmark: DATA of the set to pre-train on; None where nothing needs it.
        targets: DATA by target: cifar10, sop, svhn.
        machine: where runs are trained.
        biased: pre-train on a part of the benchmark that has ImageNet's shares of concepts.

    Finished runs with the same recipe are reused, and unfinished ones are resumed.
    """

    def __init__(
        self,
        folder: Path,
        scale: Scale,
        benchmark: str | None,
        targets: Mapping[str, str],
        machine: Machine,
        *,
        biased: bool = False,
    ) -> None:
        if biased and scale.biased_rows is None:
            what = f"the scale {scale.name} has no second benchmark with ImageNet's shares"
            raise InputError(what, argument="biased", fix="leave `biased` out")
        self.folder, self.scale, self.machine, self.biased = folder, scale, machine, biased
        self.locks = Locks(folder / "locks", self.say)
        self._place, self._targets = benchmark, dict(targets)
        self._tasks: dict[str, Task] = {}
        self._data: dict[str, tuple[str, dict[str, Any]]] = {}
        self._images: dict[tuple[str, int | None], tuple[ImageSet, ImageSet]] = {}
        self._diverged: dict[str, str] = {}

    def say(self, text: str) -> None:
        """A line on stderr."""
        remark(text, quiet=self.machine.quiet)

    @cached_property
    def device(self) -> torch.device:
        """The device that measures networks."""
        return measuring_device(self.machine.device)

    @property
    def stage(self) -> str:
        """Prefix of the main runs' names."""
        return "biased" if self.biased else "main"

    @property
    def suffix(self) -> str:
        """Suffix of the tables' names."""
        return "-biased" if self.biased else ""

    @property
    def has_imagenet_shares(self) -> bool:
        """Whether the images of the main runs were drawn with ImageNet's shares of concepts."""
        return self.biased or self.scale.concept_shares

    @property
    def rows(self) -> int:
        """Number of images in the main runs."""
        return len(self.images(self.stage)[0])

    @property
    def title(self) -> str:
        """The pre-training data, for headings."""
        shares = ", with ImageNet's shares of concepts" if self.has_imagenet_shares else ""
        recipe = self.scale.recipe
        return f"{self._seen(self.stage)}, {recipe.validation_size} px, {format_count(recipe.epochs, 'epoch')}{shares}"

    @property
    def selection_title(self) -> str:
        """The pre-training data of the selection, for exhibits of one seed."""
        return f"{self._selection_data}, one seed"

    @property
    def selection_title_of_all_seeds(self) -> str:
        """The pre-training data of the selection, and its number of seeds."""
        count = len(self.scale.selection_seeds)
        return f"{self._selection_data}, {'one seed' if count == 1 else format_count(count, 'seed')}"

    @property
    def _selection_data(self) -> str:
        return f"{self._seen('selection')}, {format_count(self.scale.selection.epochs, 'epoch')}"

    def _seen(self, stage: str) -> str:
        assert self._place is not None  # what has such a heading needs a benchmark
        return f"{self.scale.remark}{_name(self._place)}, {len(self.images(stage)[0]):,} images"

    def target_title(self, target: str) -> str:
        """A target's name in tables: its DATA's name, and the paper's target that it substitutes."""
        return f"{_name(self._targets[target])} (for {self.scale.targets[target].title})"

    def _target_and_limit(self, target: str) -> str:
        limit = self.scale.targets[target].train_rows
        return self.target_title(target) + (f", at most {limit:,} training images" if limit else "")

    def differences(self) -> list[str]:
        """Differences from the paper, one sentence each."""
        scale, recipe, selection = self.scale, self.scale.recipe, self.scale.selection
        if scale.name == "paper":
            return []
        share = self.rows // recipe.batch_size * recipe.epochs / (1_281_167 // 256 * 90)
        told = [
            f"Pre-trained on {self.rows:,} images, {recipe.validation_size} px, not ImageNet's 1,281,167 at 224 px.",
            f"Epochs: {recipe.epochs} instead of 90, which is {100 * share:.2f} % of the updates.",
        ]
        if self._targets:
            named = [self._target_and_limit(target) for target in scale.targets if target in self._targets]
            told.append(f"Targets: {'; '.join(named)}.")
        return [
            *told,
            f"tau and lambda were chosen from {len(scale.taus)} and {len(scale.lams)} values, by runs of "
            f"{selection.epochs} epochs on {len(self.images('selection')[0]):,} images.",
            f"Figure 3 fine-tunes for {scale.finetune_epochs} epochs on at most {scale.finetune_rows:,} images, not "
            "for 100 on all. Figures 4 and 5 show the models that tau and lambda were chosen by.",
        ]

    def require_places(self, targets: Iterable[str] = (), *, benchmark: bool = True) -> None:
        """Names all DATA that was not given.

        Raises:
            InputError: something was not.
        """
        missing = [
            f"`targets={target}=DATA` ({self.scale.targets[target].title}, or what stands for it)"
            for target in targets
            if target not in self._targets
        ]
        if benchmark and self._place is None:
            missing.insert(0, "`benchmark=DATA` (images to pre-train on)")
        if missing:
            raise InputError("more data is needed", fix=f"give {', '.join(missing)}")

    def task(self, target: str) -> Task:
        """The target's images, as many as the scale says.

        Raises:
            InputError: no DATA was given for it.
        """
        if target not in self._tasks:
            self.require_places([target], benchmark=False)
            wanted = self.scale.targets[target]
            task = self._tasks[target] = open_task(
                target, self._targets[target], train_rows=wanted.train_rows, test_rows=wanted.test_rows
            )
            for line in task.remarks:
                self.say(line)
        return self._tasks[target]

    def images(self, stage: str) -> tuple[ImageSet, ImageSet]:
        """The training and validation images of a stage."""
        key = self.data(stage), self._recipe(stage).parts
        if key not in self._images:
            self._images[key] = open_training_data(key[0], parts=key[1])
        return self._images[key]

    def data(self, stage: str) -> str:
        """DATA of the runs of a stage: main, selection or biased.

        Parts of the benchmark are written when they are first asked for.

        Raises:
            InputError: there is no benchmark, or the folder has a part of another one.
        """
        return self._data_of(stage)[0]

    def _data_of(self, stage: str) -> tuple[str, dict[str, Any]]:
        """And its origin: the same for the same images, whoever wrote them to a file."""
        if stage not in self._data:
            if stage == "selection" and self.scale.selection_rows is None:
                self._data[stage] = self._data_of("main")
            else:
                with self.locks.held(f"data-{stage}", always_wait=True):
                    self._data[stage] = self._part_of_benchmark(stage)
        return self._data[stage]

    def _part_of_benchmark(self, stage: str) -> tuple[str, dict[str, Any]]:
        self.require_places()
        place = self.data("main") if stage == "selection" else self._place
        assert place is not None
        images, validation = open_splits(place, parts=None if stage == "biased" else self.scale.recipe.parts)
        if validation is None:
            raise InputError(
                "has no validation split; runs of several seeds would hold out different images",
                argument="benchmark",
                value=place,
                fix="move some of each class to val/",
            )
        if stage != "selection":
            self._require_concepts(images)
        scale = self.scale
        validation = draw_images(validation, scale.validation_rows)
        size = {"main": scale.rows, "selection": scale.selection_rows, "biased": scale.biased_rows}[stage]
        origin: dict[str, Any] = {"benchmark": identity(images), "validation": identity(validation)}
        by_concept = stage == "biased" or (stage == "main" and scale.concept_shares)
        if stage == "main" and not by_concept and (size is None or len(images) <= size):
            return place, origin
        if stage == "selection":
            origin = self._data_of("main")[1]
        origin = {"of": origin, "stage": stage, "rows": size}
        if stage == "main" and by_concept:
            origin["shares"] = "imagenet11"
        folder = self.folder / "data" / stage
        if not folder.exists():
            for line in dict.fromkeys(images.remarks + validation.remarks):
                self.say(line)  # the sample no longer shows it
            write_subset(images, self._draw(images, size, by_concept=by_concept), validation, folder, origin)
        elif not same_origin(folder, origin):
            raise InputError(
                f"{folder}: was drawn from another benchmark or at another scale",
                fix="choose another `out` or move it away",
            )
        return str(folder), origin

    def _require_concepts(self, images: ImageSet) -> None:
        try:
            assign_concepts(self.scale.recipe.concepts, images.classes, np.bincount(images.labels))
        except DataError as exc:
            raise DataError(
                "its classes must be ImageNet's, by wnid or name, since the paper's concepts are of those; "
                f"got {len(images.classes)} such as {images.classes[0]!r}",
                argument="benchmark",
                value=self._place,
            ) from exc

    def _draw(self, images: ImageSet, size: int | None, *, by_concept: bool) -> NDArray[np.int64]:
        """Row numbers, ascending."""
        if by_concept:
            counts = np.bincount(images.labels, minlength=len(images.classes))
            concepts = assign_concepts(self.scale.recipe.concepts, images.classes, counts)
            return draw_by_concept(images.labels, concepts, _imagenet_shares(), size or len(images))
        rows: NDArray[np.int64] = np.sort(np.random.default_rng(0).permutation(len(images))[:size])
        return rows

    def recipe(self, stage: str, method: str, seed: int, tau: float | None, lam: float | None) -> Recipe:
        """The recipe of one run, with tau and lambda if the method has them."""
        recipe = self._recipe(stage)
        if method == "erm-long":
            recipe, method = stretch(recipe, self.scale.long_epochs), "erm"
        changes: dict[str, Any] = {"method": method, "seed": seed}
        if tau is not None and method in WITH_TAU:
            changes["tau"] = tau
        if lam is not None and method in WITH_LAMBDA:
            changes["lam"] = lam
        return recipe.replace(**changes)

    def _recipe(self, stage: str) -> Recipe:
        """Settings that all runs of a stage share."""
        recipe = self.scale.selection if stage == "selection" else self.scale.recipe
        if stage == "biased":
            return recipe.replace(parts=None)
        if stage == "selection" and self.scale.selection_rows is None:
            return recipe.replace(parts=self.scale.recipe.parts)
        return recipe

    def selection_run(self, method: str, value: float | None = None, seed: int | None = None) -> tuple[str, Recipe]:
        """Name and recipe of one run of the grid: EL with a tau, CL with a lambda, or ERM.

        The first seed of the selection is the default.
        """
        tau, lam = value if method in WITH_TAU else None, value if method in WITH_LAMBDA else None
        suffix = "" if value is None else f"-{'lam' if tau is None else 'tau'}{value:g}"
        seed = self.scale.selection_seeds[0] if seed is None else seed
        return f"selection-{method}{suffix}-s{seed}", self.recipe("selection", method, seed, tau, lam)

    def inputs(self, stage: str, recipe: Recipe) -> dict[str, Any]:
        """Everything that determines a run, as plain data."""
        return {"recipe": recipe.to_dict(), "data": self._data_of(stage)[1]}

    def run(self, name: str, recipe: Recipe) -> Path:
        """The folder of a finished run, whose name begins with its stage. The run is trained if needed.

        Raises:
            CheckpointError: another run has that name.
            DivergedError: training did, now or when it was asked for before.
            BusyError: another process trains it, and `locks.wait` is not set.
        """
        folder, stage = self.folder / "runs" / name, name.partition("-")[0]
        with self.locks.held(name):
            if name in self._diverged:
                raise DivergedError(self._diverged[name])
            resume = (folder / CHECKPOINT_NAME).exists()
            if resume and self._saved_epochs(folder, recipe, stage) == recipe.epochs:
                return folder
            self.say(f"{name}: {'training resumes' if resume else 'training'}")
            try:
                stopped = self._train(self.data(stage), recipe, folder, resume).stopped
            except DivergedError as exc:
                self._diverged[name] = f"{name}: {exc}"
                raise DivergedError(self._diverged[name]) from exc
            except StoppedError as exc:
                what = f"stopped; {name} is saved as far as it is"
                raise StoppedError(what, fix="give the same command again") from exc
            if stopped:
                raise StoppedError(f"stopped after {name}", fix="give the same command again")
        return folder

    def _train(self, data: str, recipe: Recipe, folder: Path, resume: bool) -> TrainingResult:
        machine = self.machine
        try:
            return train(
                data,
                recipe,
                folder,
                resume=resume,
                device=machine.device,
                threads=machine.threads,
                workers=machine.workers,
                quiet=machine.quiet,
            )
        except (DivergedError, StoppedError):
            raise
        except (TrainingError, InputError) as exc:
            if exc.fix_parameters <= {field.name for field in fields(Machine)}:
                raise
            fix = "repeat the command to resume"  # the report has no `resume` and none of the recipe's keys
            raise type(exc)(exc.what, argument=exc.argument, value=exc.value, fix=fix) from exc

    def _saved_epochs(self, folder: Path, recipe: Recipe, stage: str) -> int:
        saved = load_checkpoint(folder)
        if change := changed_key(saved, recipe):
            key, then, now = change
            raise CheckpointError(
                f"{folder}: was trained with {key} = {then}, this report needs {now}",
                fix="move it away, or choose another `out`",
            )
        if saved.data["fingerprint"] != self.images(stage)[0].fingerprint:
            raise CheckpointError(
                f"{folder}: was trained on other data ({saved.data['root']})",
                fix="move it away, or choose another `out`",
            )
        return saved.epoch


def identity(images: ImageSet) -> list[Any]:
    """Everything that determines a set of images, as plain data."""
    return [images.fingerprint, len(images)]


def _name(place: str) -> str:
    """DATA's own name: the last part of its path, in one line."""
    return " ".join(printable(Path(place).name or Path(place).resolve().name).split())


def _imagenet_shares() -> dict[str, float]:
    """The share of ImageNet's classes that each concept has (Table 1)."""
    concepts = list(load_concepts("imagenet11").values())
    return {name: concepts.count(name) / len(concepts) for name in sorted(set(concepts))}
