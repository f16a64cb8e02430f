"""Teachers: models whose features a network learns. The package's own engines run them, without their framework."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from robustfeat.errors import InputError, ModelFolderError, RobustFeatError
from robustfeat.hub.catalog import resolve_model
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.training.recipe import Recipe

__all__ = ["Teacher", "open_teacher", "resolve_teacher", "teacher_losses"]


class Teacher:
    """Gives the features of crops.

    Args:
        extractor: the model.

    Attributes:
        extractor: the same.
    """

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor

    def features(self, pixels: Tensor) -> Tensor:
        """The features of crops as the network in training sees them, resized to the teacher's side.

        Args:
            pixels: (m, 3, S, S) float from 0 to 255.

        Returns:
            (m, D) float32 of length 1, on the device of `pixels`.
        """
        side = self.extractor.config.preprocessing.image_size
        if pixels.shape[-1] != side:
            pixels = functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        squares = pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        size = self.extractor.batch_size
        parts = [self.extractor.embed_prepared(squares[at : at + size]) for at in range(0, len(squares), size)]
        features = np.concatenate(parts) if parts else np.empty((0, self.extractor.feature_size), np.float32)
        return functional.normalize(torch.from_numpy(features), dim=1).to(pixels.device)


def teacher_losses(projected: Tensor, features: Tensor) -> Tensor:
    """How far a network's features, projected, are from the teacher's: 1 - cos(P f(x), t(x)).

    The cosine needs no statistics of the teacher's features, whose scale differs from teacher to teacher. So it has
    no state, and an example's loss does not depend on the rest of its batch.

    Args:
        projected: (m, D).
        features: (m, D), the teacher's.

    Returns:
        (m,) float32 from 0 to 2, with the graph of `projected`.

    Source: SimReg (Navaneet et al., BMVC 2021), which regresses features of length 1: ||a - b||^2 = 2 - 2 cos.
    """
    return 1 - functional.cosine_similarity(projected.float(), features.float(), dim=1)


def resolve_teacher(recipe: Recipe) -> Recipe:
    """The recipe with what follows from its `teacher`: `teacher_sha256` and `teacher_size`.

    Raises:
        InputError: the teacher cannot be used, or is another one than the recipe's.
    """
    if not recipe.teacher:
        return recipe
    try:
        folder = resolve_model(recipe.teacher, config_hash=recipe.teacher_sha256)
    except ModelFolderError as exc:
        raise InputError(exc.what, argument="teacher", value=recipe.teacher, fix=exc.fix) from exc
    # For a transformers network, only the network itself defines D.
    size = folder.config.feature_size if folder.is_own else FeatureExtractor.open(folder).feature_size
    return recipe.replace(teacher_sha256=folder.config_hash, teacher_size=size)


def open_teacher(recipe: Recipe, device: str = "cpu") -> Teacher:
    """The recipe's teacher, ready to run on as many processors as PyTorch uses.

    Raises:
        InputError: it cannot be used, or is another one than the recipe's.
    """
    options = RunOptions(
        precision=recipe.teacher_precision,
        device="cpu" if device == "cpu" else "auto",
        threads=torch.get_num_threads(),
        config_hash=recipe.teacher_sha256,
    )
    try:
        return Teacher(FeatureExtractor.load(recipe.teacher, options))
    except RobustFeatError as exc:
        raise InputError(exc.what, argument="teacher", value=recipe.teacher, fix=exc.fix) from exc
