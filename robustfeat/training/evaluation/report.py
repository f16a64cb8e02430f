"""Everything that `robustfeat evaluate` measures of a model on tasks, as plain data and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustfeat.files import new_file
from robustfeat.hub.markdown import table
from robustfeat.serving.inputs.sources import printable
from robustfeat.system import available_cpus
from robustfeat.training.evaluation.answers import pack
from robustfeat.training.evaluation.corruptions import classify_corrupted
from robustfeat.training.evaluation.figures import Curve, Panel, draw
from robustfeat.training.evaluation.finetuning import finetune
from robustfeat.training.evaluation.probes import few_shot, libsvm, naive_bayes, nearest_neighbours, svm
from robustfeat.training.evaluation.robustness_card import Extent, measure_robustness
from robustfeat.training.evaluation.subject import NetworkSubject, Subject
from robustfeat.training.evaluation.tasks import Task, TaskFeatures, embed_task

__all__ = ["draw_finetuning", "evaluate_task", "evaluation_table", "libsvm_cell", "second_opinions"]


def evaluate_task(
    subject: Subject,
    task: Task,
    *,
    cache: Path | None = None,
    selection: str = "holdout",
    with_few_shot: bool = True,
    with_libsvm: bool = False,
    with_corruptions: bool = False,
    robustness: Extent | None = None,
    finetuned: NetworkSubject | None = None,
    finetuning: Mapping[str, Any] | None = None,
    threads: int | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """All probes of one model on one task.

    Args:
        subject: the model.
        task: what it is tried on.
        cache: a file that keeps features (see `embed_images`).
        selection: see `svm`.
        with_few_shot: also compute the curve of few images per class.
        with_libsvm: also LIBSVM's one-against-one SVM on at most 5,000 training rows.
        with_corruptions: also the SVM's accuracy on corrupted test images (see `classify_corrupted`).
        robustness: also the robustness card, to this extent (see `measure_robustness`).
        finetuned: the same model in PyTorch: also fine-tuned.
        finetuning: options of `finetune`.
        threads: number of processors; by default all that the cgroup allows.
        quiet: hide progress.

    Returns:
        Plain data: model, task, numbers of images, the model's training, and a block per probe. `answers` has the
        fingerprint of the test images, and whether the SVM is right on each (see `pack`). Only scores use test labels.
    """
    features = embed_task(subject, task, cache=cache, quiet=quiet)
    chosen = svm(features, method=selection, calibrated=robustness is not None, threads=threads, quiet=quiet)
    head = chosen.head
    assert head is not None  # an SVM is one
    result: dict[str, Any] = {
        "model": subject.name,
        "identity": list(subject.fingerprint),
        "image_size": subject.contract.image_size,
        "task": task.name,
        "classes": len(features.classes),
        "train": len(features.x),
        "test": len(features.x_test),
        "training": dict(subject.training),
        "svm": chosen.to_dict(),
        "answers": {"images": task.test.fingerprint, "svm": pack(chosen.right)},
        **second_opinions(features, with_few_shot=with_few_shot, with_libsvm=with_libsvm, threads=threads),
    }
    if with_corruptions:
        result["corruptions"] = classify_corrupted(subject, head, task.test, quiet=quiet).to_dict()
    if robustness is not None:
        result["robustness"] = measure_robustness(subject, task, features, head, robustness, cache=cache, quiet=quiet)
    if finetuned is not None:
        settings = dict(finetuning or {})
        errors = finetune(
            finetuned.network, finetuned.feature_size, finetuned.contract, task,
            device=finetuned.device, label=f"{subject.name}: fine-tuning on {task.name}", quiet=quiet, **settings,
        )  # fmt: skip
        result["finetuned"] = {**settings, "accuracy": 1 - errors[-1], "test_error": errors}
    return result


def second_opinions(
    features: TaskFeatures,
    *,
    with_few_shot: bool = True,
    with_libsvm: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """The probes beside the SVM, a block of plain data each.

    Args:
        features: features of one model and task.
        with_few_shot, with_libsvm, threads: see `evaluate_task`.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(threads or available_cpus()):
        blocks: dict[str, Any] = {
            "naive_bayes": naive_bayes(features, threads=threads).to_dict(),
            "neighbours": nearest_neighbours(features).to_dict(),
        }
        if with_few_shot:
            blocks["few_shot"] = {str(count): scores for count, scores in few_shot(features).items()}
        if with_libsvm:
            both = libsvm(features, threads=threads)
            blocks["libsvm"] = {name: score.to_dict() for name, score in both.items()}
    return blocks


def draw_finetuning(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """The test errors of each epoch, a panel for each task and a line for each model (Figure 3).

    Args:
        results: results of `evaluate_task`, with `finetuned`.
        file: .png or .svg.
    """
    panels = []
    for task in dict.fromkeys(result["task"] for result in results):
        curves = [
            Curve(
                printable(result["model"]),
                [(epoch, 100 * error) for epoch, error in enumerate(result["finetuned"]["test_error"], 1)],
            )
            for result in results
            if result["task"] == task
        ]
        panels.append(Panel(printable(task), "epoch", "test error in %", curves))
    with new_file(file) as partial:
        partial.write_bytes(draw(panels, file.suffix[1:], file.stem))


def evaluation_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results in Markdown, a row for each model and task."""
    shots = sorted({int(count) for result in results for count in result.get("few_shot", {})})
    return table([_row(result, shots) for result in results]).rstrip()


def libsvm_cell(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Both accuracies in %; * marks a solver that was stopped before its end, + LIBSVM's with LinearSVC's C."""
    return " / ".join(
        f"{100 * one['accuracy']:.2f}{'' if one['converged'] else '*'}{'' if 'C' in one or name != 'LIBSVM' else '+'}"
        for name, one in scores.items()
    )


def _row(result: Mapping[str, Any], shots: Sequence[int]) -> dict[str, str]:
    def percent(share: float) -> str:
        return f"{100 * share:.2f}"

    best = result["svm"]
    low, high = best["interval"]
    row = {
        "model": printable(result["model"]),
        "task": printable(result["task"]),
        "SVM": percent(best["accuracy"]),
        "95 %": f"{percent(low)} to {percent(high)}",
        "balanced": percent(best["balanced_accuracy"]),
        "naive Bayes": percent(result["naive_bayes"]["accuracy"]),
        "neighbours": percent(result["neighbours"]["accuracy"]),
    }
    for count in shots:
        scores = result.get("few_shot", {}).get(str(count))
        row[f"{count}-shot"] = f"{percent(scores['accuracy'])} ± {percent(scores['deviation'])}" if scores else ""
    if "libsvm" in result:
        row["LIBSVM / LinearSVC"] = libsvm_cell(result["libsvm"])
    if worse := result.get("corruptions"):
        row["corrupted"] = percent(worse["corrupted"])
        row |= {"kept": f"{worse['kept']:.3f}", "drift": f"{worse['drift']:.4f}"}
    if "finetuned" in result:
        row["fine-tuned"] = percent(result["finetuned"]["accuracy"])
    return row
