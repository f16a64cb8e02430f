"""The paper's experiments on somebody's data: what has to be trained and measured, and where it is kept."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustfeat.errors import CheckpointError, DataError, InputError
from robustfeat.progress import Progress
from robustfeat.training.checkpoint import CHECKPOINT_NAME, changed_key, load_checkpoint
from robustfeat.training.concepts import assign_concepts, load_concepts
from robustfeat.training.data import ImageSet, open_splits, open_training_data
from robustfeat.training.evaluation.corruptions import classify_corrupted
from robustfeat.training.evaluation.probes import held_out_score, svm
from robustfeat.training.evaluation.report import second_opinions
from robustfeat.training.evaluation.subject import Subject, open_subject, torch_device
from robustfeat.training.evaluation.tasks import Task, TaskFeatures, draw_images, embed_images, embed_task, open_task
from robustfeat.training.paper.cells import BusyError, Cells, held, pack
from robustfeat.training.paper.scale import CONTROLS, CORRUPTED, METHODS, TABLES, TUNED, Scale
from robustfeat.training.paper.subsets import draw_by_concept, same_origin, write_subset
from robustfeat.training.recipe import Recipe
from robustfeat.training.trainer import train

__all__ = ["Machine", "Study"]

_CHOOSING = ("fig3", "selection", "opinions", "corruptions")  # beside the tables: what needs tau and lambda
_PATIENCE = 5.0  # s, when all that is left is with other processes


@dataclass(frozen=True)
class Machine:
    """Where runs are trained.

    Attributes:
        device, threads, workers: see `train`.
        quiet: no progress.
    """

    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    quiet: bool = False


class Study:
    """Runs, features and cells of one report.

    Args:
        folder: the report's; gets `runs/`, `data/`, `cells/` and `features.db`.
        scale: how large everything is.
        benchmark: DATA of the set to pre-train on; None where nothing needs it.
        targets: DATA by target: cifar10, sop, svhn.
        machine: where runs are trained.
        biased: pre-train on a part of the benchmark that has ImageNet's shares of concepts.
        controls: the tables have the control methods, too.

    What is there already is taken: finished runs with the same recipe, unfinished ones go on, and a cell whose
    inputs are the same needs no run at all.
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
        controls: bool = False,
    ) -> None:
        self.folder, self.scale, self.machine = folder, scale, machine
        self.biased, self.controls = biased, controls
        self._benchmark, self._targets = benchmark, dict(targets)
        self._locks = folder / "locks"
        self.cells = Cells(folder / "cells", self._locks)
        self._tasks: dict[str, Task] = {}
        self._data: dict[str, str] = {}
        self._identities: dict[str, list[Any]] = {}
        self._features = folder / "features.db"

    def require_data(self, exhibits: Sequence[str]) -> None:
        """Opens whatever these need, before anything that takes long.

        Raises:
            InputError, DataError: something is missing or cannot be used.
        """
        if self.biased and self.scale.biased_rows is None:
            raise InputError(f"--biased: at --scale {self.scale.name} the benchmark has ImageNet's shares itself")
        needed = {*TABLES, *_CHOOSING} & set(exhibits)
        if needed:
            # All of them choose tau and lambda.
            for target in self.scale.targets:
                self.task(target)
        if needed or {"fig4", "fig5"} & set(exhibits):
            _ = self.benchmark
            self.data(self.stage)

    @property
    def stage(self) -> str:
        """What names of runs begin with."""
        return "biased" if self.biased else "main"

    def task(self, target: str) -> Task:
        """The target's images, as many as the scale says.

        Raises:
            InputError: no DATA was given for it.
        """
        if target not in self._tasks:
            if target not in self._targets:
                raise InputError(f"--target {target}=DATA: is missing; {self.scale.targets[target].title} is needed")
            wanted = self.scale.targets[target]
            self._tasks[target] = open_task(
                target, self._targets[target], train_rows=wanted.train_rows, test_rows=wanted.test_rows
            )
        return self._tasks[target]

    @cached_property
    def benchmark(self) -> tuple[ImageSet, ImageSet]:
        """What the main runs see: training and validation images."""
        return open_training_data(self.data("main"), parts=self.scale.recipe.parts)

    def _main_data(self) -> str:
        if self._benchmark is None:
            raise InputError("--benchmark DATA: is missing; the set of images to pre-train on")
        return self._benchmark

    def data(self, stage: str) -> str:
        """DATA of the runs of a stage; parts of the benchmark are written when they are first asked for."""
        if stage not in self._data:
            if stage == "selection" and self.scale.selection_rows is None:
                self._data[stage] = self.data("main")
            else:
                with held(self._locks / f"data-{stage}.lock", wait=True):
                    self._data[stage] = self._part_of_benchmark(stage)
        return self._data[stage]

    def _part_of_benchmark(self, stage: str) -> str:
        place = self.data("main") if stage == "selection" else self._main_data()
        images, validation = open_splits(place, parts=None if stage == "biased" else self.scale.recipe.parts)
        if validation is None:
            raise InputError(
                f"--benchmark {place}: has no validation split; runs of several seeds would hold out different images. "
                "Move some of each class to val/"
            )
        size = {"main": self.scale.rows, "selection": self.scale.selection_rows, "biased": self.scale.biased_rows}[
            stage
        ]
        if stage == "main" and (size is None or len(images) <= size):
            return place
        origin = {"benchmark": _identity(images), "validation": _identity(validation), "stage": stage, "rows": size}
        folder = self.folder / "data" / stage
        if not folder.exists():
            write_subset(images, self._draw(stage, images, size), validation, folder, origin)
        elif not same_origin(folder, origin):
            raise InputError(
                f"{folder}: was drawn from another benchmark or at another scale; choose another --out or move it away"
            )
        return str(folder)

    def _draw(self, stage: str, images: ImageSet, size: int | None) -> NDArray[np.int64]:
        """Row numbers, ascending."""
        if stage == "biased":
            counts = np.bincount(images.labels, minlength=len(images.classes))
            concepts = assign_concepts(self.scale.recipe.concepts, images.classes, counts)
            return draw_by_concept(images.labels, concepts, _imagenet_shares(), size or len(images))
        rows: NDArray[np.int64] = np.sort(np.random.default_rng(0).permutation(len(images))[:size])
        return rows

    def recipe(self, stage: str, method: str, seed: int, tau: float | None, lam: float | None) -> Recipe:
        """Of one run; tau and lambda are filled in where the method has them."""
        recipe = self.scale.selection if stage == "selection" else self.scale.recipe
        if stage == "biased":
            recipe = recipe.replace(parts=None)
        elif stage == "selection" and self.scale.selection_rows is None:
            recipe = recipe.replace(parts=self.scale.recipe.parts)
        changes: dict[str, Any] = {"method": "erm" if method == "erm-long" else method, "seed": seed}
        if method == "erm-long":
            changes["epochs"] = self.scale.long_epochs
        if tau is not None and method in {"el", "hrrl", "random"}:
            changes["tau"] = tau
        if lam is not None and method in {"cl", "hrrl"}:
            changes["lam"] = lam
        return recipe.replace(**changes)

    def run(self, name: str, recipe: Recipe) -> Path:
        """The folder of a finished run, whose name begins with its stage: as it is, or trained now.

        Raises:
            CheckpointError: another run has that name.
            BusyError: another process trains it, and `cells.wait` is False.
        """
        with held(self._locks / f"{name}.lock", wait=self.cells.wait):
            return self._run(name, recipe)

    def _run(self, name: str, recipe: Recipe) -> Path:
        folder, stage = self.folder / "runs" / name, name.partition("-")[0]
        resume = (folder / CHECKPOINT_NAME).exists()
        if resume:
            saved = load_checkpoint(folder)
            if change := changed_key(saved, recipe):
                name, then, now = change
                raise CheckpointError(
                    f"{folder}: was trained with {name} = {then}, this report needs {now}; move it away, or choose "
                    "another --out"
                )
            if saved.data["fingerprint"] != self._benchmark_of(stage, recipe)[0]:
                raise CheckpointError(
                    f"{folder}: was trained on other data ({saved.data['root']}); move it away, or choose another --out"
                )
            if saved.epoch == recipe.epochs:
                return folder
        self.say(f"{name}: {'goes on' if resume else 'is trained'}")
        train(
            self.data(stage),
            recipe,
            folder,
            resume=resume,
            device=self.machine.device,
            threads=self.machine.threads,
            workers=self.machine.workers,
            quiet=self.machine.quiet,
        )
        return folder

    @cached_property
    def device(self) -> torch.device:
        """Where networks are measured."""
        return torch_device(self.machine.device)

    def say(self, text: str) -> None:
        """A line on stderr."""
        Progress("", 0, quiet=self.machine.quiet).say(text)

    @property
    def methods(self) -> tuple[str, ...]:
        """Rows of Tables 2 to 4."""
        return METHODS + (CONTROLS if self.controls else ())

    def main_run(self, method: str, seed: int) -> tuple[str, Recipe]:
        """Name and recipe of one run, with the chosen tau and lambda where the method has them."""
        tau, lam = self.chosen if method in TUNED else (None, None)
        return f"{self.stage}-{method}-s{seed}", self.recipe(self.stage, method, seed, tau, lam)

    def score(self, method: str, seed: int, target: str) -> Mapping[str, Any]:
        """A cell of Tables 2 to 4: the SVM's accuracy on the target, and which test images it tells."""

        def measure(subject: Subject, task: Task) -> dict[str, Any]:
            found = svm(self._features_of(subject, task), threads=self.machine.threads, quiet=self.machine.quiet)
            return {**found.to_dict(), "right": pack(found.right)}

        return self._measured("svm", method, seed, target, measure)

    def opinions(self, method: str, seed: int, target: str) -> Mapping[str, Any]:
        """Second opinions on the same features; LIBSVM's for the first seed alone."""
        chosen, with_libsvm = self.score(method, seed, target), seed == self.scale.seeds[0]

        def measure(subject: Subject, task: Task) -> dict[str, Any]:
            return second_opinions(self._features_of(subject, task), chosen, with_libsvm=with_libsvm)

        return self._measured("opinions", method, seed, target, measure, libsvm=with_libsvm)

    def corrupted(self, method: str, seed: int, target: str) -> Mapping[str, Any]:
        """What the SVM keeps under common corruptions; `told`: of how many of them, by test image."""
        chosen, rows = self.score(method, seed, target), self.scale.corrupted_rows

        def measure(subject: Subject, task: Task) -> dict[str, Any]:
            features = self._features_of(subject, task)
            head = svm(features, cs=[chosen["C"]], scalings=[chosen["scaling"]], threads=self.machine.threads).head
            assert head is not None  # an SVM is one
            found = classify_corrupted(subject, head, draw_images(task.test, rows), quiet=self.machine.quiet)
            return {**found.to_dict(), "told": found.right.sum(0, np.uint8).tobytes().hex()}

        return self._measured("corruptions", method, seed, target, measure, rows=rows)

    def _measured(
        self,
        kind: str,
        method: str,
        seed: int,
        target: str,
        measure: Callable[[Subject, Task], dict[str, Any]],
        **settings: Any,
    ) -> Mapping[str, Any]:
        """A cell about one run and one target; `settings` decide it, too."""
        (name, recipe), task = self.main_run(method, seed), self.task(target)

        def compute() -> dict[str, Any]:
            return {**measure(open_subject(str(self.run(name, recipe)), device=self.machine.device), task), "run": name}

        inputs = {**self.inputs(self.stage, recipe), "task": self.identity(task), **settings}
        return self.cells.get(f"{kind}-{target}-{name}", inputs, compute)

    def _features_of(self, subject: Subject, task: Task) -> TaskFeatures:
        return embed_task(subject, task, cache=self._features, quiet=self.machine.quiet)

    def measure(self, exhibits: Sequence[str]) -> None:
        """Computes the cells of the selection and of the main runs that these need.

        Run by run and seed by seed, so that what is stopped has used each run it trained. What another process with
        the same folder is doing is left to it.
        """
        tables = [TABLES[name] for name in exhibits if name in TABLES]
        todo: list[Callable[[], object]] = []
        if {*TABLES, *_CHOOSING} & set(exhibits):
            todo += [partial(self._held_out, *tried) for tried in self._grid()]
        for seed, method in itertools.product(self.scale.seeds, self.methods):
            todo += [partial(self.score, method, seed, target) for target in tables]
            if "opinions" in exhibits:
                todo += [partial(self.opinions, method, seed, target) for target in self.scale.targets]
            if "corruptions" in exhibits and method in CORRUPTED:
                todo += [partial(self.corrupted, method, seed, target) for target in self.scale.targets]
        self.cells.wait, told = False, False
        while todo:
            left = []
            for work in todo:
                try:
                    work()
                except BusyError:
                    left.append(work)
            if len(left) == len(todo):
                if not told:
                    self.say(f"waiting for other processes, which are at work on the rest in {self.folder}")
                told = True
                time.sleep(_PATIENCE)
            todo = left
        self.cells.wait = True

    def alone(self) -> AbstractContextManager[None]:
        """Waits for other processes that draw this report's exhibits."""
        return held(self._locks / "report.lock", wait=True)

    def inputs(self, stage: str, recipe: Recipe) -> dict[str, Any]:
        """What decides a run, for a cell."""
        return {"recipe": recipe.to_dict(), "benchmark": self._benchmark_of(stage, recipe)}

    def _benchmark_of(self, stage: str, recipe: Recipe) -> list[Any]:
        if stage not in self._identities:
            self._identities[stage] = _identity(open_training_data(self.data(stage), parts=recipe.parts)[0])
        return self._identities[stage]

    def validation_inputs(self, stage: str, recipe: Recipe) -> dict[str, Any]:
        """As `inputs`, for what is measured on the benchmark's validation images."""
        return {**self.inputs(stage, recipe), "validation": _identity(self.benchmark[1])}

    @staticmethod
    def identity(task: Task) -> list[Any]:
        """What decides a task, for a cell."""
        return _identity(task.train) + _identity(task.test)

    @cached_property
    def chosen(self) -> tuple[float, float]:
        """Tau and lambda, by the mean over the targets of the accuracy on held-out training images."""
        scores: dict[tuple[str, float], list[float]] = {}
        for method, value, _, share in self.selection():
            scores.setdefault((method, value), []).append(share)
        best = {}
        for method in ("el", "cl"):
            means = {value: float(np.mean(shares)) for (one, value), shares in scores.items() if one == method}
            best[method] = max(means, key=lambda value: means[value])
        return best["el"], best["cl"]

    def selection(self) -> Iterator[tuple[str, float, str, float]]:
        """What was tried: method, value, target, held-out accuracy."""
        for method, value, target in self._grid():
            yield method, value, target, self._held_out(method, value, target)

    def _grid(self) -> Iterator[tuple[str, float, str]]:
        for method, values in (("el", self.scale.taus), ("cl", self.scale.lams)):
            for value, target in itertools.product(values, self.scale.targets):
                yield method, value, target

    def selection_run(self, method: str, tau: float | None = None, lam: float | None = None) -> tuple[str, Recipe]:
        """Name and recipe of one run of the grid."""
        seed = self.scale.selection.seed
        value = f"-tau{tau:g}" if tau is not None else f"-lam{lam:g}" if lam is not None else ""
        return f"selection-{method}{value}-s{seed}", self.recipe("selection", method, seed, tau, lam)

    def _held_out(self, method: str, value: float, target: str) -> float:
        name, recipe = self.selection_run(method, **{"tau" if method == "el" else "lam": value})
        task = self.task(target)

        def compute() -> dict[str, Any]:
            subject = open_subject(str(self.run(name, recipe)), device=self.machine.device)
            x = embed_images(subject, task.train, cache=self._features, label=f"{name}: {target}", quiet=True)
            found = held_out_score(x, task.train.labels, threads=self.machine.threads)
            if math.isnan(found["held_out"]):
                raise DataError(f"{target}: one image a class leaves none to choose tau and lambda by; give it more")
            return found

        inputs = {**self.inputs("selection", recipe), "task": _identity(task.train)}
        return float(self.cells.get(f"{target}-{name}", inputs, compute)["held_out"])


def _identity(images: ImageSet) -> list[Any]:
    return [images.fingerprint, len(images)]


def _imagenet_shares() -> dict[str, float]:
    """The share of ImageNet's classes that each concept has (Table 1)."""
    concepts = list(load_concepts("imagenet11").values())
    return {name: concepts.count(name) / len(concepts) for name in sorted(set(concepts))}
