"""How far a small change of an image's pixels must go until a head answers otherwise. Needs the extra `attack`."""

from __future__ import annotations

import math
import warnings
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustfeat.errors import DecodeError, RobustFeatError, first_line
from robustfeat.progress import Progress
from robustfeat.serving.heads.head import Head
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.evaluation.inputs import REPAIR
from robustfeat.training.evaluation.subject import NetworkSubject, Subject, open_network

__all__ = ["AttackedHead", "measure_attack", "network_to_attack"]

_STEPS = 50
_BATCH = 10


def network_to_attack(model: str, subject: Subject, device: str = "auto") -> tuple[NetworkSubject | None, str]:
    """The network that gives gradients of a subject, or None and the reason.

    Args:
        model: the MODEL that the subject was opened from.
        subject: used as it is if it runs in PyTorch.
        device: see `open_network`.
    """
    try:
        _import_foolbox()
        network = subject if isinstance(subject, NetworkSubject) else open_network(model, device=device)
    except ImportError as exc:
        return None, f"foolbox cannot be imported ({first_line(exc)}): pip install 'robustfeat[attack]'"
    except RobustFeatError as exc:
        return None, f"it needs the network in PyTorch ({exc.what})"
    return network, ""


class AttackedHead(nn.Module):
    """The margins of a linear head on a network's features, from (n, 3, S, S) RGB pixels between 0 and 1."""

    def __init__(self, subject: NetworkSubject, head: Head) -> None:
        super().__init__()
        self.network, self._head, contract = subject.network, head, subject.contract
        self._flipped = contract.channel_order == "bgr"
        self._mean, self._std, self._coefficients, self._intercepts, self._shift, self._scale = (
            torch.as_tensor(np.asarray(values), dtype=torch.float32, device=subject.device)
            for values in (
                np.reshape(contract.mean, (3, 1, 1)),
                np.reshape(contract.std, (3, 1, 1)),
                head.arrays["coefficients"],
                head.arrays["intercepts"],
                head.arrays.get("scaling.mean", 0.0),
                head.arrays.get("scaling.scale", 1.0),
            )
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Margins (n, K)."""
        x = pixels.flip(1) if self._flipped else pixels
        features: Tensor = self.network((x - self._mean) / self._std)
        if self._head.scaling == "l2":
            features = nn.functional.normalize(features)
        margins = (features - self._shift) / self._scale @ self._coefficients.T + self._intercepts
        return torch.cat([-margins, margins], 1) if margins.shape[1] == 1 else margins


def measure_attack(subject: NetworkSubject, head: Head, images: ImageSet, *, quiet: bool = True) -> dict[str, Any]:
    """The median L2 distance to an image with another answer, found by DeepFool.

    The attack starts from the answer on the image itself, right or wrong. Its distance is an upper bound: a stronger
    attack may find a nearer image. An image without another answer counts as infinitely far.

    Args:
        subject: the model.
        head: a linear head on its features.
        images: the images to attack.
        quiet: hide progress.

    Returns:
        `method`, `images`, `changed` (share), `l2` (of pixels between 0 and 1), and `levels`, the root mean square
        change of a value of 255. The last two are None if less than half of the answers changed.

    Source: Moosavi-Dezfooli, Fawzi and Frossard, CVPR 2016, as foolbox's `L2DeepFoolAttack`.
    """
    foolbox = _import_foolbox()
    model = AttackedHead(subject, head).eval()
    attacked = foolbox.PyTorchModel(model, bounds=(0, 1), device=subject.device)
    attack = foolbox.attacks.L2DeepFoolAttack(steps=_STEPS, loss="logits")
    images = images.decoded_by(subject.contract.version)
    distances = np.full(len(images), np.inf)
    progress = Progress(f"{subject.name}: attack", len(images), quiet=quiet)
    for start in range(0, len(images), _BATCH):
        rows = range(start, min(start + _BATCH, len(images)))
        try:
            squares = np.stack([subject.prepare(images.image(row)) for row in rows])
        except DecodeError as exc:
            raise DecodeError(str(exc), fix=REPAIR) from exc
        pixels = torch.from_numpy(squares).to(subject.device).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            answers = model(pixels).argmax(1)
        _, moved, changed = attack(attacked, pixels, answers, epsilons=None)
        lengths = (moved - pixels).flatten(1).norm(dim=1)
        distances[rows.start : rows.stop] = torch.where(changed, lengths, torch.inf).cpu().numpy()
        progress.advance(len(rows))
    progress.finish()
    median = float(np.median(distances))
    found = math.isfinite(median)
    values = 3 * subject.contract.image_size**2
    return {
        "method": f"DeepFool of foolbox {metadata.version('foolbox')}",
        "images": len(images),
        "changed": float(np.isfinite(distances).mean()),
        "l2": median if found else None,
        "levels": 255 * median / math.sqrt(values) if found else None,
    }


def _import_foolbox() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports names that SciPy deprecates
        import foolbox
    return foolbox
