"""Everything that `robustfeat evaluate` measures of a model on tasks, as plain data and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from robustfeat.training.evaluation.probes import few_shot, libsvm, naive_bayes, nearest_neighbours, svm
from robustfeat.training.evaluation.subject import Subject
from robustfeat.training.evaluation.tasks import Task, embed_task

__all__ = ["evaluate_task", "evaluation_table"]


def evaluate_task(
    subject: Subject,
    task: Task,
    *,
    cache: Path | None = None,
    with_few_shot: bool = True,
    with_libsvm: bool = False,
    threads: int | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """All probes of one model on one task.

    Args:
        subject: the model.
        task: what it is tried on.
        cache: a file that keeps features (see `embed_images`).
        with_few_shot: also the curve of few images a class.
        with_libsvm: also LIBSVM's one-against-one SVM on at most 5,000 training rows.
        threads: processors; by default what the cgroup grants.
        quiet: no progress.

    Returns:
        Plain data: model, task, numbers of images, and a block for each probe. Test labels enter the scores alone.
    """
    features = embed_task(subject, task, cache=cache, quiet=quiet)
    chosen = svm(features, threads=threads, quiet=quiet)
    result: dict[str, Any] = {
        "model": subject.name,
        "task": task.name,
        "classes": len(features.classes),
        "train": len(features.x),
        "test": len(features.x_test),
        "svm": chosen.to_dict(),
        "naive_bayes": naive_bayes(features).to_dict(),
        "neighbours": nearest_neighbours(features).to_dict(),
    }
    if with_few_shot:
        result["few_shot"] = {str(count): scores for count, scores in few_shot(features).items()}
    if with_libsvm:
        both = libsvm(features, chosen.details["C"], chosen.details["scaling"])
        result["libsvm"] = {name: score.to_dict() for name, score in both.items()}
    return result


def evaluation_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results in Markdown, a row for each model and task."""
    shots = sorted({int(count) for result in results for count in result.get("few_shot", {})})
    head = ["model", "task", "SVM", "95 %", "balanced", "naive Bayes", "neighbours", *(f"{n}-shot" for n in shots)]
    if any("libsvm" in result for result in results):
        head.append("LIBSVM / LinearSVC")
    lines = [head, ["---"] * len(head)]
    lines += [list(_cells(result, shots, len(head) > 7 + len(shots))) for result in results]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(result: Mapping[str, Any], shots: Sequence[int], has_libsvm: bool) -> Iterator[str]:
    def percent(share: float) -> str:
        return f"{100 * share:.2f}"

    best = result["svm"]
    low, high = best["interval"]
    yield from (result["model"], result["task"], percent(best["accuracy"]), f"{percent(low)} to {percent(high)}")
    yield from (percent(best["balanced_accuracy"]), percent(result["naive_bayes"]["accuracy"]))
    yield percent(result["neighbours"]["accuracy"])
    for count in shots:
        scores = result.get("few_shot", {}).get(str(count))
        yield f"{percent(scores['accuracy'])} ± {percent(scores['deviation'])}" if scores else ""
    if has_libsvm:
        both = result.get("libsvm", {})
        yield " / ".join(percent(score["accuracy"]) for score in both.values())
