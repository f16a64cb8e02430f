"""Real images whose activations give the ranges of int8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import DataError, DecodeError, HubError
from robustfeat.hub.preprocessing import Preprocessing, decode, resize_and_crop
from robustfeat.progress import remark
from robustfeat.serving.inputs.choice import say_left_out
from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.recipe import Recipe

__all__ = ["folder_images", "import_images", "training_images"]

_IMAGES = 256
_FIX = "pass a folder of images as `calibration`, or `int8=False`"


def folder_images(folder: str | Path, contract: Preprocessing) -> list[NDArray[np.uint8]]:
    """The first decodable images of a folder, as (S, S, 3). A line on stderr counts skipped files.

    Raises:
        DataError: there is none.
    """
    images: list[NDArray[np.uint8]] = []
    failed = 0
    with list_inputs([folder]) as listed:
        for image in listed:
            try:
                images.append(resize_and_crop(decode(image.read(), version=contract.version), contract))
            except (DecodeError, OSError):
                failed += 1
                continue
            if len(images) == _IMAGES:
                break
        said = say_left_out(listed.left_out, failed)
    if said and images:
        remark(f"{folder}: {said}", quiet=False)
    if not images:
        raise DataError("none of its images can be decoded", argument="calibration", value=folder)
    return images


def import_images(folder: str | Path | None, contract: Preprocessing, *, int8: bool) -> list[NDArray[np.uint8]] | None:
    """Images for the int8 file of an imported network, beside the golden ones; None leaves the file out.

    Raises:
        DataError: there is a folder, and it has none.
    """
    if not int8:
        return None
    return folder_images(folder, contract) if folder else []


def training_images(
    data: Mapping[str, Any], recipe: Recipe, contract: Preprocessing, *, count: int = _IMAGES
) -> list[NDArray[np.uint8]]:
    """Some of the images that a run was trained on, as (S, S, 3).

    Args:
        data: what its checkpoint says of them.
        recipe: the run's.
        contract: how they become squares.
        count: how many at most. The first ones are the same for every count.

    Raises:
        DataError: they are not there any more, or have changed.
    """
    try:
        train, _ = open_training_data(
            data["root"],
            val_fraction=recipe.val_fraction,
            seed=recipe.seed,
            parts=recipe.parts,
            labels=recipe.labels,
        )
    except (DataError, HubError) as exc:
        raise DataError(f"the export needs real images: {exc}", fix=_FIX) from exc
    if train.fingerprint != data["fingerprint"]:
        raise DataError(f"{data['root']}: has changed since training", fix=_FIX)
    train = train.decoded_by(recipe.preprocessing_version)
    order = np.random.default_rng(0).permutation(len(train))
    images: list[NDArray[np.uint8]] = []
    for index in order[: 2 * count]:
        if len(images) == count:
            break
        try:
            images.append(resize_and_crop(train.image(int(index)), contract))
        except DecodeError:
            continue
    return images
