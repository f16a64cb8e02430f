"""Measures a study's runs: lists the cells and computes their contents."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import nn

from robustfeat.errors import DataError, DivergedError, InputError
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.evaluation.answers import pack
from robustfeat.training.evaluation.corruptions import classify_corrupted
from robustfeat.training.evaluation.finetuning import finetune
from robustfeat.training.evaluation.probes import fold_scores, held_out_score, svm
from robustfeat.training.evaluation.report import second_opinions
from robustfeat.training.evaluation.robustness import accuracy_by_step, class_hits
from robustfeat.training.evaluation.subject import NetworkSubject, open_network
from robustfeat.training.evaluation.tasks import Task, TaskFeatures, draw_images, embed_images, embed_task
from robustfeat.training.loop.checkpoint import Checkpoint, load_checkpoint, network_of
from robustfeat.training.loop.journal import final_accuracies
from robustfeat.training.paper.cells import Cells
from robustfeat.training.paper.choice import FoldMeans, choose_within_one_error
from robustfeat.training.paper.locks import BusyError
from robustfeat.training.paper.scale import CONTROLS, CORRUPTED, TABLES, WITH_LAMBDA, WITH_TAU
from robustfeat.training.paper.study import Study, identity
from robustfeat.training.recipe import Recipe

__all__ = ["Measures"]

_OF_ALL_TARGETS = {"verdicts", "exploratory"}
"""Exhibits that compare the methods on each target."""
_CHOOSING = {*TABLES, *_OF_ALL_TARGETS, "fig3", "selection", "opinions", "corruptions"}
"""Exhibits that need tau and lambda, and so all targets."""
_OF_RUNS = _CHOOSING | {"gate", "fig4", "fig5"}
"""Exhibits that show more than the paper's own numbers and formulas."""
_WORTH_SAYING = 1.0  # s that a result took
_PATIENCE = 5.0  # s, when all that is left is with other processes


class Measures:
    """Results of a study's runs, each kept as a cell: one whose inputs are the same needs no run at all.

    Args:
        study: gets `cells/` and `features.db` in its folder.
        controls: the tables have the control methods, too.
        methods: the only methods of the tables, besides ERM; by default all.

    Raises:
        InputError: a method is none of these, or the scale has no controls.
    """

    def __init__(self, study: Study, *, controls: bool = False, methods: Sequence[str] = ()) -> None:
        self.study, self.scale = study, study.scale
        if controls and study.scale.margin is not None:
            what = f"the scale {study.scale.name} has no control methods"
            raise InputError(what, argument="controls", fix="leave `controls` out")
        known = study.scale.methods + (CONTROLS if controls else ())
        if unknown := [method for method in methods if method not in known]:
            raise InputError(f"expected {', '.join(known)}", argument="method", value=unknown[0])
        self.methods = tuple(method for method in known if not methods or method in {"erm", *methods})
        self.cells = Cells(study.folder / "cells", study.locks)
        self._cache = study.folder / "features.db"
        self._open: tuple[str, Recipe, NetworkSubject] | None = None  # the last one: results come run by run

    def require_data(self, exhibits: Sequence[str]) -> None:
        """Opens whatever these need, before anything that takes long.

        Raises:
            InputError, DataError: something is missing or cannot be used.
        """
        if not self.needs_runs(exhibits):
            return
        targets = list(self.scale.targets) if (_CHOOSING | {"gate"}) & set(exhibits) else []
        self.study.require_places(targets)
        for target in targets:
            self.study.task(target)
        self.study.data(self.study.stage)

    @staticmethod
    def needs_runs(exhibits: Sequence[str]) -> bool:
        """Whether any of them shows more than the paper's own numbers and formulas."""
        return bool(_OF_RUNS & set(exhibits))

    @property
    def corrupted_methods(self) -> tuple[str, ...]:
        """Methods of the tables that are compared on corrupted images and by fine-tuning."""
        return tuple(method for method in CORRUPTED if method in self.methods)

    def compute(self, exhibits: Sequence[str]) -> None:
        """Computes the cells that these need.

        Run by run and seed by seed, so that what is stopped has used each run it trained. What another process with
        the same folder is doing is left to it.

        Raises:
            DivergedError: a main run diverged; what can be computed without it was.
        """
        study, todo, failed = self.study, list(self._needed(set(exhibits))), None
        total = len(todo)
        study.locks.wait, told = False, False
        try:
            while todo:
                left: list[Callable[[], object]] = []
                for place, work in enumerate(todo):
                    began = time.monotonic()
                    try:
                        work()
                        if time.monotonic() - began > _WORTH_SAYING:
                            study.say(f"{total - len(left) - len(todo) + place + 1} of {total} results")
                    except BusyError:
                        left.append(work)
                    except DivergedError as exc:
                        failed = failed or exc
                if len(left) == len(todo):
                    if not told:
                        study.say(f"waiting for other processes, which are at work on the rest in {study.folder}")
                    told = True
                    time.sleep(_PATIENCE)
                todo = left
        finally:
            study.locks.wait = True
        if failed:
            raise failed

    def _needed(self, exhibits: set[str]) -> Iterator[Callable[[], object]]:
        if "gate" in exhibits:
            yield from (partial(self.main_folds, *run) for run in self.gate_runs())
        if _CHOOSING & exhibits:
            yield from itertools.chain.from_iterable(self._trial(*tried) for tried in self.grid())
        if "selection" in exhibits and not self.scale.folds:
            yield from (partial(self.held_out, "erm", None, target) for target in self.scale.targets)
        if "fig4" in exhibits:
            yield from (partial(self.by_step, method, tau) for _, method, tau in self.step_models())
        if "fig5" in exhibits:
            yield from (partial(self.by_class, method, lam) for _, method, lam in self.concept_models())
        joined = _OF_ALL_TARGETS if self.scale.margin is None else _OF_ALL_TARGETS | set(TABLES)
        tables = [target for name, target in TABLES.items() if {name, *joined} & exhibits]
        for seed, method in itertools.product(self.scale.seeds, self.methods):
            yield from (partial(self.score, method, seed, target) for target in tables)
            if "opinions" in exhibits:
                yield from (partial(self.opinions, method, seed, target) for target in self.scale.targets)
            if "corruptions" in exhibits and method in self.corrupted_methods:
                yield from (partial(self.corrupted, method, seed, target) for target in self.scale.targets)
            if "fig3" in exhibits and method in self.corrupted_methods and seed == self.scale.seeds[0]:
                yield from (partial(self.finetuned, method, target) for target in self.scale.targets)

    # The gate

    def gate_runs(self) -> Iterator[tuple[str, int, str]]:
        """Method, seed and target of the gate's cells; none for a scale without a gate."""
        seeds = self.scale.gate.seeds if self.scale.gate else ()
        for seed, method, target in itertools.product(seeds, ("erm", "erm-long"), self.scale.targets):
            yield method, seed, target

    def main_folds(self, method: str, seed: int, target: str) -> Mapping[str, Any]:
        """The accuracy of a main run on folds of the target's training images. No test image is seen."""
        name, recipe = self.main_run(method, seed)
        images = self.study.task(target).train

        def compute() -> dict[str, Any]:
            return {**self._measure_folds(name, recipe, target, images), **self._accuracies(name)}

        inputs = {**self.study.inputs(self.study.stage, recipe), "task": identity(images)}
        return self.cells.get("folds", f"{target}-{name}", inputs, compute)

    # The choice of tau and lambda

    def grid(self) -> Iterator[tuple[str, float, str]]:
        """The trials: method, value, target. Only values that a method of the tables has are tried."""
        for method, values, users in (("el", self.scale.taus, WITH_TAU), ("cl", self.scale.lams, WITH_LAMBDA)):
            if set(users).intersection(self.methods):
                for value, target in itertools.product(values, self.scale.targets):
                    yield method, value, target

    def _trial(self, method: str, value: float, target: str) -> Iterator[Callable[[], object]]:
        """The cells of a trial."""
        if self.scale.folds:
            for seed in self.scale.selection_seeds:
                yield partial(self.held_out_folds, method, value, target, seed)
        else:
            yield partial(self.held_out, method, value, target)

    def held_out_folds(self, method: str, value: float, target: str, seed: int) -> list[float] | None:
        """The SVM's accuracy on each fold of the target's training images; None where training diverged."""
        name, recipe = self.study.selection_run(method, value, seed)
        images = self.study.task(target).train
        measure = partial(self._measure_folds, name, recipe, target, images)
        found = self._of_selection_run("folds", name, recipe, measure, target, task=identity(images))
        return None if found is None else list(found["folds"])

    def fold_means(self, method: str, value: float, targets: Sequence[str] = ()) -> FoldMeans | None:
        """Means over the targets, by default all, and the seeds of the selection. None if a training diverged."""
        tried = itertools.product(targets or self.scale.targets, self.scale.selection_seeds)
        runs = [self.held_out_folds(method, value, target, seed) for target, seed in tried]
        told = [run for run in runs if run is not None]
        return FoldMeans.of(told) if len(told) == len(runs) else None

    def _measure_folds(self, name: str, recipe: Recipe, target: str, images: ImageSet) -> dict[str, Any]:
        x = embed_images(self._subject(name, recipe), images, cache=self._cache, label=f"{name}: {target}", quiet=True)
        found = fold_scores(x, images.labels, threads=self.study.machine.threads)
        if not found["folds"]:
            raise DataError(f"{target}: one image a class leaves no folds", fix="give it more")
        return found

    def held_out(self, method: str, value: float | None, target: str) -> float | None:
        """The SVM's accuracy on held-out training images of the target; None where training diverged."""
        name, recipe = self.study.selection_run(method, value)
        images = self.study.task(target).train

        def measure() -> dict[str, Any]:
            subject = self._subject(name, recipe)
            x = embed_images(subject, images, cache=self._cache, label=f"{name}: {target}", quiet=True)
            found = held_out_score(x, images.labels, threads=self.study.machine.threads)
            if math.isnan(found["held_out"]):
                raise DataError(
                    f"{target}: one image a class leaves none to choose tau and lambda by", fix="give it more"
                )
            return found

        found = self._of_selection_run("held-out", name, recipe, measure, target, task=identity(images))
        return None if found is None else float(found["held_out"])

    def held_out_cell(self, method: str, value: float | None, target: str) -> Mapping[str, Any] | None:
        """The cell of `held_out`; None where it was not computed. ERM's decides nothing, so reports may lack it."""
        name, recipe = self.study.selection_run(method, value)
        inputs = {**self.study.inputs("selection", recipe), "task": identity(self.study.task(target).train)}
        return self.cells.known("held-out", f"{target}-{name}", inputs)

    @cached_property
    def chosen(self) -> tuple[float | None, float | None]:
        """Tau and lambda, by the mean over the targets of the accuracy on held-out training images.

        None where no method of the tables has the parameter.

        Raises:
            DivergedError: no value of one of them could be trained with.
        """
        if self.scale.folds:
            return self._chosen_by_folds()
        means: dict[str, dict[float, float]] = {method: {} for method in dict.fromkeys(one[0] for one in self.grid())}
        for (method, value), tried in itertools.groupby(self.grid(), key=lambda one: one[:2]):
            shares = [self.held_out(*one) for one in tried]
            if None not in shares:
                means[method][value] = float(np.mean(np.array(shares, float)))
        best = {}
        for method, found in means.items():
            _require_some(method, found)
            best[method] = max(found, key=found.__getitem__)
        return best.get("el"), best.get("cl")

    def _chosen_by_folds(self) -> tuple[float | None, float | None]:
        means: dict[str, dict[float, FoldMeans]] = {}
        for method, value in dict.fromkeys(one[:2] for one in self.grid()):
            own = means.setdefault(method, {})
            if (scores := self.fold_means(method, value)) is not None:
                own[value] = scores
        best = {}
        for method, found in means.items():
            _require_some(method, found)
            best[method] = choose_within_one_error(found, min if method == "el" else max)
        return best.get("el"), best.get("cl")

    def _of_selection_run(
        self,
        kind: str,
        run: str,
        recipe: Recipe,
        measure: Callable[[], dict[str, Any]],
        target: str | None = None,
        **settings: Any,
    ) -> Mapping[str, Any] | None:
        """A cell about one run of the selection, and one target if there is one. None where training diverged.

        `settings` decide it, too.
        """

        def compute() -> dict[str, Any]:
            try:
                return {**measure(), **self._accuracies(run)}
            except DivergedError as exc:  # a result as well
                return {"diverged": str(exc)}

        name = f"{target}-{run}" if target else run
        found = self.cells.get(kind, name, {**self.study.inputs("selection", recipe), **settings}, compute)
        return None if "diverged" in found else found

    # Main runs

    def main_run(self, method: str, seed: int) -> tuple[str, Recipe]:
        """Name and recipe of one run, with the chosen tau and lambda where the method has them."""
        tau, lam = self.chosen if method in WITH_TAU + WITH_LAMBDA else (None, None)
        stage = self.study.stage
        return f"{stage}-{method}-s{seed}", self.study.recipe(stage, method, seed, tau, lam)

    def score(self, method: str, seed: int, target: str) -> Mapping[str, Any]:
        """A cell of Tables 2 to 4: the SVM's accuracy on the target, and whether it is right on each test image."""

        def measure(subject: NetworkSubject, task: Task) -> dict[str, Any]:
            machine = self.study.machine
            found = svm(self._features(subject, task), threads=machine.threads, quiet=machine.quiet)
            return {**found.to_dict(), "right": pack(found.right)}

        return self._of_main_run("svm", method, seed, self.study.task(target), measure)

    def opinions(self, method: str, seed: int, target: str) -> Mapping[str, Any]:
        """Other classifiers on the same features; LIBSVM only for the first seed."""
        with_libsvm = seed == self.scale.seeds[0]

        def measure(subject: NetworkSubject, task: Task) -> dict[str, Any]:
            features, threads = self._features(subject, task), self.study.machine.threads
            return second_opinions(features, with_libsvm=with_libsvm, threads=threads)

        return self._of_main_run("opinions", method, seed, self.study.task(target), measure, libsvm=with_libsvm)

    def corrupted(self, method: str, seed: int, target: str) -> Mapping[str, Any]:
        """The SVM's accuracy under common corruptions. `told` counts them per test image."""
        chosen, rows = self.score(method, seed, target), self.scale.corrupted_rows

        def measure(subject: NetworkSubject, task: Task) -> dict[str, Any]:
            features, machine = self._features(subject, task), self.study.machine
            head = svm(features, cs=[chosen["C"]], scalings=[chosen["scaling"]], threads=machine.threads).head
            assert head is not None  # an SVM is one
            found = classify_corrupted(subject, head, draw_images(task.test, rows), quiet=machine.quiet)
            return {**found.to_dict(), "told": found.right.sum(0, np.uint8).tobytes().hex()}

        return self._of_main_run("corruptions", method, seed, self.study.task(target), measure, rows=rows)

    def finetuned(self, method: str, target: str) -> Mapping[str, Any]:
        """Figure 3: the test error of each epoch, from the run of the first seed."""
        task, scale = self.study.task(target), self.scale
        task = replace(task, train=draw_images(task.train, scale.finetune_rows))
        settings: dict[str, Any] = {
            "epochs": scale.finetune_epochs,
            "milestone": scale.finetune_milestone,
            "batch_size": min(128, len(task.train)),
        }

        def measure(subject: NetworkSubject, task: Task) -> dict[str, Any]:
            device, quiet = self.study.device, self.study.machine.quiet
            errors = finetune(
                subject.network, subject.feature_size, subject.contract, task, device=device, quiet=quiet, **settings
            )
            return {"test_error": errors}

        return self._of_main_run("finetune", method, scale.seeds[0], task, measure, **settings)

    def _of_main_run(
        self,
        kind: str,
        method: str,
        seed: int,
        task: Task,
        measure: Callable[[NetworkSubject, Task], dict[str, Any]],
        **settings: Any,
    ) -> Mapping[str, Any]:
        """A cell about one run and one target; `settings` decide it, too."""
        name, recipe = self.main_run(method, seed)

        def compute() -> dict[str, Any]:
            return {**measure(self._subject(name, recipe), task), "run": name, **self._accuracies(name)}

        decides = {"task": identity(task.train) + identity(task.test), **settings}
        inputs = {**self.study.inputs(self.study.stage, recipe), **decides}
        return self.cells.get(kind, f"{task.name}-{name}", inputs, compute)

    def _accuracies(self, name: str) -> dict[str, float]:
        """What a finished run logged of its own training and validation images."""
        return final_accuracies(self.study.folder / "runs" / name)

    def _subject(self, name: str, recipe: Recipe) -> NetworkSubject:
        """The network of a run, which stays open until another one is asked for."""
        if self._open is None or self._open[:2] != (name, recipe):
            self._open = None  # before the next one is trained
            subject = open_network(str(self.study.run(name, recipe)), device=self.study.machine.device)
            self._open = name, recipe, subject
        return self._open[2]

    def _features(self, subject: NetworkSubject, task: Task) -> TaskFeatures:
        return embed_task(subject, task, cache=self._cache, quiet=self.study.machine.quiet)

    # Runs of the selection, on the benchmark's validation images

    def step_models(self) -> list[tuple[str, str, float | None]]:
        """The curves of Figure 4: label, method and tau."""
        return [("ERM", "erm", None), *((f"EL, tau {tau:g}", "el", tau) for tau in self.scale.taus)]

    def by_step(self, method: str, value: float | None) -> list[float] | None:
        """Accuracy on validation images that were moved along their gradient, by the length of the step.

        None where training diverged.
        """
        name, recipe = self.study.selection_run(method, value)
        steps = self.scale.steps

        def measure() -> dict[str, Any]:
            checkpoint, (_, images) = self._checkpoint(name, recipe), self.study.images("selection")
            network, contract = self._network(checkpoint), recipe.preprocessing()
            return {"accuracy": accuracy_by_step(network, contract, images, steps, self.study.device)}

        found = self._of_selection_run("steps", name, recipe, measure, steps=steps)
        return None if found is None else list(found["accuracy"])

    def concept_models(self) -> list[tuple[str, str, float | None]]:
        """The curves of Figure 5: label, method and lambda."""
        return [("ERM", "erm", None), *((f"CL, lambda {lam:g}", "cl", lam) for lam in self.scale.lams)]

    def by_class(self, method: str, value: float | None) -> Mapping[str, Any] | None:
        """Accuracy on validation images: `by_concept` and `by_class`; None where training diverged."""
        name, recipe = self.study.selection_run(method, value)

        def measure() -> dict[str, Any]:
            checkpoint, (trained, images) = self._checkpoint(name, recipe), self.study.images("selection")
            network, contract = self._network(checkpoint), recipe.preprocessing()
            right, count = class_hits(network, contract, images, self.study.device)
            # Classes without training images have no concept.
            shown = (count > 0) & (np.bincount(trained.labels, minlength=len(count)) > 0)
            of_class = np.array(checkpoint.concept_of_class)
            by_concept = {}
            for place, concept in enumerate(checkpoint.concepts):
                if (own := shown & (of_class == place)).any():
                    by_concept[concept] = right[own].sum() / count[own].sum()
            by_class = {images.classes[place]: right[place] / count[place] for place in np.flatnonzero(shown)}
            return {"by_concept": by_concept, "by_class": by_class}

        return self._of_selection_run("concepts", name, recipe, measure)

    def _checkpoint(self, name: str, recipe: Recipe) -> Checkpoint:
        return load_checkpoint(self.study.run(name, recipe))

    def _network(self, checkpoint: Checkpoint) -> nn.Module:
        return network_of(checkpoint).to(self.study.device)


def _require_some(method: str, found: Mapping[float, object]) -> None:
    """Refuses a selection without any trained value."""
    if not found:
        raise DivergedError(f"{method}: every run of the selection diverged", fix="try a smaller learning rate")
