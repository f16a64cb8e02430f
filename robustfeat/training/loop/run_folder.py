"""The folder of a run: what its files are called, and whether it has some already. Loads no PyTorch."""

from __future__ import annotations

from pathlib import Path

from robustfeat.errors import CheckpointError, InputError

__all__ = [
    "BEST_NAME",
    "CHECKPOINT_NAME",
    "CURVES_NAME",
    "METRICS_NAME",
    "TENSORBOARD_NAME",
    "checkpoint_file",
    "require_unused",
]

CHECKPOINT_NAME = "checkpoint.pt"
BEST_NAME = "best.pt"
METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"
CURVES_NAME = "curves.png"


def checkpoint_file(path: Path, name: str = CHECKPOINT_NAME) -> Path:
    """The checkpoint of this name in a run's folder, or the file itself.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        file = path / name if path.is_dir() else path
        found = file.is_file()
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    if not found:
        raise CheckpointError(
            f"{path}: holds no {name}; expected the folder of a run of robustfeat train",
            # Not in backticks: `best` of an export is a switch.
            fix="train with best = validation or best = probe in the recipe" if name == BEST_NAME else None,
        )
    return file


def require_unused(run: Path) -> None:
    """A new run may be written to this folder.

    Raises:
        CheckpointError: the folder already has a run.
        InputError: the folder cannot be read.
    """
    try:
        used = (run / CHECKPOINT_NAME).exists() or (run / METRICS_NAME).exists()
    except OSError as exc:  # unhandled, it would end one rank and leave the others waiting
        raise InputError(
            f"cannot be read ({exc.strerror or exc})", argument="out", value=run, fix="choose another folder"
        ) from exc
    if used:
        raise CheckpointError(
            f"{run}: holds a run already", fix="pass `resume=True` to resume it, or choose another `out`"
        )
