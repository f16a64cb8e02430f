"""Keeps a teacher's features of a fixed number of crops per image in the run's folder."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustfeat.errors import InputError
from robustfeat.files import new_file, reserve_space
from robustfeat.progress import Progress
from robustfeat.training.data.batches import OrderedPlan, TrainingBatches, load_batches
from robustfeat.training.data.image_set import decoding_key
from robustfeat.training.loop.distributed import together
from robustfeat.training.loop.preparation import Run

__all__ = ["KeptFeatures", "keep_features", "require_feature_room"]

_FILE, _STATE = "teacher-features.f16", "teacher-features.json"
_FORMAT_VERSION = 1
_BLOCK = 256
_GB = 1e9


@dataclass(frozen=True)
class KeptFeatures:
    """Features by crop and image.

    Attributes:
        values: (crops, N, D) float16, in a memory-mapped file; 0 for images that could not be decoded.
    """

    values: NDArray[np.float16]

    def features(self, rows: Tensor, epoch: int) -> Tensor:
        """(m, D) float32 of these (m,) rows; epoch e shows crop e modulo the number of crops."""
        return torch.from_numpy(self.values[epoch % len(self.values), rows.numpy()].astype(np.float32))


def require_feature_room(run: Run) -> None:
    """Checks that the kept features are within the recipe's bound and fit on the disk.

    Raises:
        InputError: it does not.
    """
    recipe = run.recipe
    if not recipe.teacher_crops:
        return
    need = _size(run)
    if need > recipe.teacher_gb * _GB:
        raise InputError(
            f"features of {recipe.teacher_crops} crops of {len(run.train_set):,} images take {need / _GB:.3g} GB, and "
            f"`teacher_gb` allows {recipe.teacher_gb:g}",
            argument="teacher_crops",
            value=recipe.teacher_crops,
            fix="pass fewer, a larger `teacher_gb`, or 0, which computes features at each step",
        )


def keep_features(run: Run) -> Run:
    """The run with the features of its fixed crops, where the recipe asks for them; a collective call.

    The first rank computes them, and resumes after a killed process.

    Raises:
        InputError: they do not fit on the disk, or the folder of the run is not shared by all ranks.
    """
    if not run.recipe.teacher_crops:
        return run
    with together():
        if run.ranks.rank == 0:
            try:
                _fill(run)
            except OSError as exc:
                raise _unwritable(run.folder, exc.strerror or str(exc)) from exc
    with together():
        file = run.folder / _FILE
        if not file.exists() or file.stat().st_size != _size(run):
            raise InputError(f"{file}: is not there on rank {run.ranks.rank}", fix="pass an `out` that all ranks share")
        values = np.memmap(file, np.float16, "r", shape=_shape(run))
    return replace(run, kept=KeptFeatures(values))


def _unwritable(folder: Path, reason: str) -> InputError:
    return InputError(
        f"{folder}: the teacher's features cannot be written ({reason})", fix="free space or choose another `out`"
    )


def _shape(run: Run) -> tuple[int, int, int]:
    assert run.recipe.teacher_size is not None
    return run.recipe.teacher_crops, len(run.train_set), run.recipe.teacher_size


def _size(run: Run) -> int:
    return 2 * math.prod(_shape(run))


def _key(run: Run) -> dict[str, Any]:
    """All that decides the features."""
    recipe = run.recipe
    names = ("seed", "min_crop_area", "cache_px", "teacher_crops", "teacher_sha256", "teacher_precision")
    return {
        "format_version": _FORMAT_VERSION,
        "fingerprint": run.train_set.fingerprint,
        "side": _side(run),
        **decoding_key(recipe.preprocessing_version),
        **{name: getattr(recipe, name) for name in names},
    }


def _side(run: Run) -> int:
    return max(side for _, side in run.recipe.image_sizes)


def _read_done(file: Path, key: dict[str, Any]) -> int:
    """Number of written blocks; 0 if the file belongs to something else."""
    try:
        state = json.loads(file.read_text("utf-8"))
        done = state.pop("done")
    except (OSError, ValueError, KeyError, AttributeError):
        return 0
    return done if state == key and type(done) is int and done >= 0 else 0


def _fill(run: Run) -> None:
    file, state_file, key, size = run.folder / _FILE, run.folder / _STATE, _key(run), _size(run)
    done = _read_done(state_file, key)
    if not done or not file.exists() or file.stat().st_size != size:
        state_file.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        done = 0
        if size > shutil.disk_usage(run.folder).free:
            raise _unwritable(run.folder, f"{size / _GB:.3g} GB are needed")
        with open(file, "wb") as handle:
            reserve_space(handle, size)
    recipe, images = run.recipe, len(run.train_set)
    plan = OrderedPlan(
        run.train_set, _BLOCK, seed=recipe.seed, min_crop_area=recipe.min_crop_area, fixed_crops=recipe.teacher_crops
    )
    if done >= plan.batches:
        return
    row_bytes = 2 * _shape(run)[2]
    start = done // plan.steps * images + done % plan.steps * _BLOCK
    progress = Progress("the teacher's features", recipe.teacher_crops * images, start=start, quiet=run.quiet)
    assert run.teacher is not None
    batches = TrainingBatches(run.train_set, _side(run), plan)
    with open(file, "r+b") as handle:
        for number, batch in enumerate(load_batches(batches, run.decoders, range(done, plan.batches)), done):
            assert batch.rows is not None
            rows = plan.rows(number)
            block = np.zeros((len(rows), _shape(run)[2]), np.float16)
            block[batch.rows.numpy() - rows[0]] = run.teacher.features(batch.images.float()).numpy()
            handle.seek((number // plan.steps * images + int(rows[0])) * row_bytes)
            handle.write(block.tobytes())
            handle.flush()
            os.fsync(handle.fileno())
            with new_file(state_file) as partial:
                partial.write_text(json.dumps({**key, "done": number + 1}), "utf-8")
            progress.advance(len(rows))
    progress.finish()
