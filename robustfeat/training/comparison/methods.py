"""Methods over seeds and tasks: which runs belong together, and how far each method is from a baseline."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import InputError
from robustfeat.training.comparison.scores import RunScore
from robustfeat.training.comparison.statistics import Difference, Interval, holm, image_interval, paired, pooled

__all__ = ["INTERVALS", "JOINT", "Result", "Runs", "compare_methods", "differing_settings", "group_scores"]

INTERVALS = ("pooled", "paired")
JOINT = "mean of all tasks (exploratory)"


@dataclass(frozen=True, eq=False)
class Runs:
    """One method's runs on one task, in ascending order of their seeds.

    Attributes:
        accuracies: shares of the test images.
        seeds: of the runs; None where unknown.
        answers: for each run, (m,) bool, which test images it told; None where that was not kept.
        fitted: by name (`training_accuracy`, `validation_accuracy`) for each run, where all runs logged it.
    """

    accuracies: Sequence[float]
    seeds: Sequence[int | None]
    answers: Sequence[NDArray[np.bool_]] | None = None
    fitted: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Result:
    """A method on a task, and its difference from the baseline.

    Attributes:
        method, task: names.
        runs: of the method.
        paired: the difference of runs with the same seed; None for the baseline, and where the seeds differ.
        pooled: the difference with the deviation of all methods; None for the baseline.
        over_images: bootstrap interval over the test images; None where answers were not kept.
        p: of the chosen interval.
        holm: that p-value, corrected for all comparisons; None for the joint rows.
    """

    method: str
    task: str
    runs: Runs
    paired: Difference | None = None
    pooled: Difference | None = None
    over_images: Interval | None = None
    p: float | None = None
    holm: float | None = None

    def of(self, interval: str) -> Difference | None:
        """The paired or the pooled difference."""
        return self.paired if interval == "paired" else self.pooled


def group_scores(scores: Sequence[RunScore]) -> dict[str, dict[str, Runs]]:
    """Runs by task and method. A method is a name of the user's, or everything in the recipe but the seed.

    Raises:
        InputError: two scores are of the same run, or of other test images.
    """
    labels = _labels(scores)
    found: dict[str, dict[str, list[RunScore]]] = {}
    for label, score in zip(labels, scores, strict=True):
        found.setdefault(score.task, {}).setdefault(label, []).append(score)
    for task, methods in found.items():
        _require_same_images(task, [score for own in methods.values() for score in own])
        for label, own in methods.items():
            _require_distinct(task, label, own)
    return {task: {label: _runs(own) for label, own in methods.items()} for task, methods in found.items()}


def _labels(scores: Sequence[RunScore]) -> list[str]:
    """Each score's method, with the settings by which methods of the same name differ."""
    settings: dict[str, dict[str, Mapping[str, Any]]] = {}
    for score in scores:
        if score.name is None:
            own = settings.setdefault(str(score.settings["method"]), {})
            own.setdefault(json.dumps(score.settings, sort_keys=True), score.settings)
    labels = []
    for score in scores:
        method = str(score.settings["method"])
        keys = _differing(list(settings.get(method, {}).values()))
        told = [f"{key} {_short(score.settings.get(key))}" for key in keys]
        labels.append(score.name or ", ".join([method, *told]))
    return labels


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({json.dumps(one.get(key), sort_keys=True) for one in settings}) > 1]


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 16 else text[:8]


def differing_settings(scores: Sequence[RunScore]) -> list[str]:
    """Keys of the recipes, beside the method, in which runs differ that are compared."""
    return [key for key in _differing([score.settings for score in scores]) if key != "method"]


def _require_same_images(task: str, scores: Sequence[RunScore]) -> None:
    first = next((score for score in scores if score.images is not None), None)
    for score in scores:
        if first and score.images is not None and score.images != first.images:
            raise InputError(
                f"{task}: {first.source} and {score.source} were scored on different test images",
                fix="score all runs on the same images, or call the tasks differently",
            )


def _require_distinct(task: str, label: str, scores: Sequence[RunScore]) -> None:
    seen: dict[object, str] = {}
    for score in scores:
        key = score.source if score.seed is None else score.seed
        if key in seen:
            seed = "" if score.seed is None else f" with seed {score.seed}"
            raise InputError(
                f"{task}: {seen[key]} and {score.source} are both {label}{seed}",
                fix="leave one out, or name them apart as NAME=RUN",
            )
        seen[key] = score.source


def _runs(scores: Sequence[RunScore]) -> Runs:
    ordered = sorted(scores, key=lambda score: -1 if score.seed is None else score.seed)
    answers = [score.right for score in ordered if score.right is not None]
    fitted = {}
    for name in ("training_accuracy", "validation_accuracy"):
        known = [value for score in ordered if (value := getattr(score, name)) is not None]
        if len(known) == len(ordered):
            fitted[name] = known
    return Runs(
        [score.accuracy for score in ordered],
        [score.seed for score in ordered],
        answers if len(answers) == len(ordered) else None,
        fitted,
    )


def compare_methods(
    tasks: Mapping[str, Mapping[str, Runs]], baseline: str, *, interval: str = "pooled", apart: Collection[str] = ()
) -> list[Result]:
    """Each method against the baseline on each task, and on the mean of the tasks where there are several.

    Args:
        tasks: runs by task and method.
        baseline: a method of each task.
        interval: pooled or paired, for the p-values.
        apart: methods whose comparisons are a family of their own for Holm's correction.

    Raises:
        InputError: a task lacks the baseline or another method, or the interval is paired and seeds differ.
    """
    results = []
    for task, methods in tasks.items():
        if baseline not in methods or len(methods) < 2:
            lacks = f"no {baseline}" if baseline not in methods else "nothing beside it"
            raise InputError(
                f"{task}: expected the baseline {baseline} and another method; got {lacks} ({', '.join(methods)})",
                fix="pass more runs, or choose another `baseline`",
            )
        results += _on_task(task, methods, baseline, interval)
    corrected = [replace(result, holm=p) for result, p in zip(results, _holm(results, apart), strict=True)]
    joint = _joint(tasks) if len(tasks) > 1 else {}
    return corrected + (_on_task(JOINT, joint, baseline, interval) if baseline in joint and len(joint) > 1 else [])


def _holm(results: Sequence[Result], apart: Collection[str]) -> list[float | None]:
    """Corrected p-values, by family."""
    corrected: list[float | None] = [None] * len(results)
    for family in (False, True):
        known = {
            place: result.p
            for place, result in enumerate(results)
            if result.p is not None and (result.method in apart) is family
        }
        for place, p in zip(known, holm(list(known.values())), strict=True):
            corrected[place] = p
    return corrected


def _on_task(task: str, methods: Mapping[str, Runs], baseline: str, interval: str) -> list[Result]:
    base = methods[baseline]
    by_method = pooled({method: runs.accuracies for method, runs in methods.items()}, baseline)
    results = [Result(baseline, task, base)]
    for method, runs in methods.items():
        if method == baseline:
            continue
        same = list(runs.seeds) == list(base.seeds) and None not in runs.seeds
        result = Result(
            method,
            task,
            runs,
            paired(runs.accuracies, base.accuracies) if same else None,
            by_method[method],
            image_interval(runs.answers, base.answers) if runs.answers and base.answers else None,
        )
        chosen = result.of(interval)
        if chosen is None:
            raise InputError(
                f"{task}: {method} has the seeds {_seeds(runs)} and {baseline} {_seeds(base)}; pairs need the same",
                fix="train the missing seeds, or pass `interval=pooled`",
            )
        results.append(replace(result, p=chosen.p))
    return results


def _seeds(runs: Runs) -> str:
    return ", ".join("unknown" if seed is None else str(seed) for seed in runs.seeds)


def _joint(tasks: Mapping[str, Mapping[str, Runs]]) -> dict[str, Runs]:
    """The mean over the tasks of the runs with the same seed, for methods that have all of them."""
    first, *others = tasks.values()
    joint = {}
    for method, runs in first.items():
        own = [runs, *(other[method] for other in others if method in other)]
        if None in runs.seeds or any(list(one.seeds) != list(runs.seeds) for one in own) or len(own) < len(tasks):
            continue
        means = np.mean([one.accuracies for one in own], axis=0)
        joint[method] = Runs([float(mean) for mean in means], runs.seeds, None, runs.fitted)
    return joint
