"""The two adversaries of Hierarchically Robust Representation Learning (Qian, Hu and Li, CVPR 2020).

`perturb` is the example level (Theorem 2): an image moves by tau along its normalised input gradient.
`ConceptAdversary` is the concept level (Eqs. 4 to 6): a distribution q over concepts climbs the weighted loss.
Algorithm 1 joins them: with x~ = perturb(x), the model descends mean(weights * loss(x~)) (Eq. 5), and the same
losses then move q (Eq. 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustfeat.errors import DivergedError
from robustfeat.training.concept_noise import ConceptNoise
from robustfeat.training.divergences import DIVERGENCES, project_simplex
from robustfeat.training.loop.distributed import sum_over_ranks
from robustfeat.training.network import batch_norms

__all__ = [
    "ConceptAdversary",
    "Losses",
    "concept_totals",
    "inner_output",
    "input_gradient",
    "perturb",
    "project_simplex",
    "step_along",
    "step_by",
]

_BATCHES_FOR_MU = 10


@contextmanager
def _inner_pass(model: nn.Module, batch_norm: str) -> Iterator[None]:
    """No gradients for parameters, and BatchNorm's running statistics stay as they are.

    Autograd would skip the parameters' gradients by itself; a compiled graph would not, unless they ask for none.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = [layer for layer in batch_norms(model) if layer.training and layer.track_running_stats]
    for parameter in parameters:
        parameter.requires_grad_(False)
    for layer in layers:
        if batch_norm == "eval":
            layer.training = False
        else:
            layer.track_running_stats = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for layer in layers:
            layer.training = layer.track_running_stats = True


_LOSS_SCALE = 64.0
"""Scale that keeps gradients of well classified images above fp16's smallest numbers. The step divides by it."""


Losses = Callable[[Any], Tensor]
"""From what a network gives to one loss per image, (m,)."""


def inner_output(model: nn.Module, images: Tensor, *, half: bool = False, batch_norm: str = "batch") -> Any:
    """The model's output for images in an inner pass, without any gradient; see `input_gradient`."""
    with torch.no_grad(), _inner_pass(model, batch_norm):
        return model(_seen(images, half))


def _seen(images: Tensor, half: bool) -> Tensor:
    """The images for an inner pass."""
    if not half:
        return images
    size = ((images.shape[2] + 1) // 2, (images.shape[3] + 1) // 2)
    return functional.adaptive_avg_pool2d(images, size).contiguous(memory_format=torch.channels_last)


def input_gradient(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    losses: Losses | None = None,
    half: bool = False,
    batch_norm: str = "batch",
) -> Tensor:
    """The gradient of each image's loss with regard to the image, times `_LOSS_SCALE`.

    Args:
        model: maps images to logits (m, C); used in the mode that it is in. Under data parallelism the wrapped module.
        images: (m, 3, H, W) float, in the network's normalised input space.
        labels: (m,) int64, or (m, C) float shares of classes.
        losses: losses of the model's output, instead of the cross-entropy with `labels`.
        half: compute the loss at half the resolution, a quarter of the work, still for the whole image's gradient.
        batch_norm: `batch` (this batch's statistics, where the model is in training mode) or `eval` (running ones).

    Returns:
        (m, 3, H, W) float32. Parameters get no gradient, and running statistics stay as they are.
    """
    x = images.detach().requires_grad_()
    with torch.enable_grad(), _inner_pass(model, batch_norm):
        # The sum, not the mean: a mean divides each image's gradient by m, and fp16 then underflows.
        output = model(_seen(x, half))
        if losses is None:
            loss = functional.cross_entropy(output.float(), labels, reduction="sum")
        else:
            loss = losses(output).sum()
        (gradient,) = torch.autograd.grad(_LOSS_SCALE * loss, x)
    return gradient.float()


def step_along(images: Tensor, direction: Tensor, tau: float, std: Tensor | None = None) -> Tensor:
    """Moves each image by the length tau: x~ = x + tau z, z = direction / ||direction||.

    Args:
        images: (m, 3, H, W) float, in the network's normalised input space.
        direction: (m, 3, H, W) float, in the same space; an image whose direction is zero or not finite stays.
        tau: L2 length of the step.
        std: (1, 3, 1, 1); where it is given, tau is a length in pixels of range [0, 1], and `direction` a gradient.

    Returns:
        (m, 3, H, W), detached, of the dtype of `images`.
    """
    direction = direction.float()
    if std is not None:
        direction = direction / std  # the chain rule: pixels = normalised * std + mean
    norm = torch.linalg.vector_norm(direction, dim=(1, 2, 3), keepdim=True)
    length = tau / norm if std is None else tau / (norm * std)
    # Few passes over the images: each costs one percent of a step on a CPU.
    moved = torch.addcmul(images.detach().float(), direction, length)
    return torch.where((norm > 0) & torch.isfinite(norm), moved, images.detach()).to(images.dtype)


def step_by(images: Tensor, gradient: Tensor, tau: float, std: Tensor | None = None) -> Tensor:
    """Moves each image by tau times its gradient, which is not normalised: x~ = x + tau g.

    Args:
        images: (m, 3, H, W) float, in the network's normalised input space.
        gradient: (m, 3, H, W) float32, in the same space; an image whose gradient is not finite stays.
        tau: factor of the gradient.
        std: (1, 3, 1, 1); where it is given, the step is one of pixels of range [0, 1], by the gradient by pixels.

    Returns:
        (m, 3, H, W), detached, of the dtype of `images`.
    """
    if std is not None:
        gradient = gradient / std.square()  # once for the chain rule, once from pixels back to the input space
    finite = torch.isfinite(gradient).all(dim=(1, 2, 3), keepdim=True)
    moved = torch.add(images.detach().float(), gradient, alpha=tau)
    return torch.where(finite, moved, images.detach()).to(images.dtype)


def perturb(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    tau: float,
    *,
    losses: Losses | None = None,
    half: bool = False,
    batch_norm: str = "batch",
    std: Tensor | None = None,
    unit: bool = True,
) -> Tensor:
    """The augmentation of Theorem 2: x~ = x + tau * grad / ||grad||, per image; x~ = x where the gradient is 0.

    The inner pass computes the input's gradient alone: parameters get no gradient, and BatchNorm's running
    statistics stay as they are. Under data parallelism pass the wrapped module (`ddp.module`).

    Args:
        model, images, labels, losses, half, batch_norm: see `input_gradient`.
        tau: L2 length of the step, in the normalised input space, or, with `std`, in pixels of range [0, 1].
        std: see `step_along`.
        unit: otherwise x~ = x + tau * grad, which is the theorem's own step where tau is 1 / (3 L_x).

    Returns:
        (m, 3, H, W), detached, of the dtype of `images`.

    Source: Theorem 2 and Algorithm 1, line 9. The step is not clipped to valid pixels: the paper does not.
    """
    if tau == 0:
        return images.detach()
    gradient = input_gradient(model, images, labels, losses=losses, half=half, batch_norm=batch_norm)
    if unit:
        return step_along(images, gradient, tau, std)
    return step_by(images, gradient / _LOSS_SCALE, tau, std)


def concept_totals(losses: Tensor, concepts: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each concept in this step's batch, on all ranks together: the losses' sum, the examples, the squares' sum.

    Args:
        losses: (m,) of this rank.
        concepts: (m,) int64 below `size`.

    Returns:
        (K,) float64 each: one exchange under data parallelism, and the same bits on each rank.
    """
    membership, values = functional.one_hot(concepts, size).double().T, losses.detach().double()
    # A product, not index_add_: that sums in no fixed order on a GPU.
    totals = torch.stack([membership @ values, membership.sum(1), membership @ values.square()])
    sums, counts, squares = sum_over_ranks(totals)
    return sums, counts, squares


class ConceptAdversary:
    """The adversarial distribution q over K concepts and its ascent (Eqs. 4 to 6 and Algorithm 1).

    Args:
        counts: (K,) N_k, the training examples of each concept, all positive.
        lam: lambda of Eq. 4, positive and finite; a smaller one lets q go further from the reference.
        warmup_steps: s of Algorithm 1; for the first s steps the step size is 1 / (c lambda t).
        c: the divisor during those steps, at least 1; `auto`: Theorem 3's (mu / lambda) sqrt(ln s / 2 s), with mu
            the mean norm of the gradient at q0 over the first 10 batches, which leave q where it is.
        reference: (K,) q0, on the simplex; N_k / N by default.
        divergence: what keeps q near q0: `l2` (Eq. 4), `kl` or `chi2`; see `divergences`.
        baseline: take the last batch's mean loss from each loss. In expectation that adds one constant to all
            components of the gradient, which the projection takes out again, and its noise shrinks.
        pass_steps, repeats: see `ConceptNoise`.

    Attributes:
        q: (K,) float64, the distribution that weighs the losses now.
        reference: (K,) float64, q0.
        step: number of updates.
        noise: the effect of sampling on q.

    q, its gradient and the projection are float64: in float32 (N / N_k)(N_k / N) is not 1 for a quarter of counts.
    On a GPU no step waits for the device, but for one in 256 where nobody reads the noise.
    """

    def __init__(
        self,
        counts: Tensor,
        lam: float,
        warmup_steps: int = 1000,
        c: float | str = 10.0,
        reference: Tensor | None = None,
        *,
        divergence: str = "l2",
        baseline: bool = False,
        pass_steps: int | None = None,
        repeats: int = 1,
    ) -> None:
        counts = torch.as_tensor(counts).double()
        if counts.ndim != 1 or counts.numel() == 0 or not bool((counts > 0).all()):
            raise ValueError("counts must be 1-D and positive: drop concepts without examples first")
        if not 0 < lam < float("inf"):
            raise ValueError(f"lam must be positive and finite; got {lam}")
        if warmup_steps < 0 or (c != "auto" and (isinstance(c, str) or c < 1)):
            raise ValueError(f"warmup_steps must be >= 0 and c auto or >= 1; got {warmup_steps} and {c}")
        if c == "auto" and warmup_steps < 2:
            raise ValueError(f"c = auto must have warmup_steps >= 2, since ln s is in it; got {warmup_steps}")
        self.lam, self.warmup_steps, self.baseline = float(lam), int(warmup_steps), baseline
        self._divergence = DIVERGENCES[divergence]
        self._c: float | Tensor | None = None if isinstance(c, str) else float(c)
        self._n_over_nk = counts.sum() / counts
        if reference is None:
            self.reference = counts / counts.sum()
        else:
            self.reference = torch.as_tensor(reference).double()
            if self.reference.shape != counts.shape or not bool((self.reference >= 0).all()):
                raise ValueError(f"reference must be {tuple(counts.shape)} and non-negative")
            if abs(float(self.reference.sum()) - 1) > 1e-6:
                raise ValueError(f"reference must sum to 1; got {float(self.reference.sum())}")
        self.q = self.reference.clone()
        self.noise = ConceptNoise(
            self.lam, self._n_over_nk, None if divergence == "l2" else self.reference, pass_steps, repeats
        )
        self.step = 0
        self._norms: list[Tensor] = []
        self._lagged_mean: Tensor | None = None

    @property
    def c(self) -> float | None:
        """The divisor of the first phase; None while `auto` has not measured it yet."""
        return None if self._c is None else float(self._c)

    def weights(self, concepts: Tensor) -> Tensor:
        """(N / N_k) q_k for each example: (m,) int64 concepts to (m,) float32 weights (Eq. 5)."""
        self._move_to(concepts.device)
        return self.concept_weights().float()[concepts]

    def concept_weights(self) -> Tensor:
        """(K,) float64: (N / N_k) q_k, what an example of each concept weighs now; 1 for all at q = N_k / N."""
        return self._n_over_nk * self.q

    def weight_noise(self) -> tuple[Tensor, Tensor]:
        """How far the examples' weights are from q0's, without what sampling does, and what sampling does.

        Returns:
            Two scalars, root mean squares over the training examples: the signal, which is the distance less the
            noise and at least 0, and the noise.
        """
        # An example's weight is (N / N_k) q_k, and N_k / N of the examples have it.
        n_over_nk, moved = self._n_over_nk.cpu(), (self.q - self.reference).cpu()
        distance = (n_over_nk * moved.square()).sum()
        noise = (n_over_nk * self.noise.deviations().square()).sum()
        return (distance - noise).clamp_min(0).sqrt(), noise.sqrt()

    def weigh(self, losses: Tensor, concepts: Tensor) -> Tensor:
        """The weights of this step's examples by q_t, as (m,) float32; then `update` gives q_{t+1} (Algorithm 1)."""
        weights = self.weights(concepts)
        self.update(losses, concepts)
        return weights

    def update(self, losses: Tensor, concepts: Tensor) -> None:
        """One step of Eq. 6 from this batch's losses, under data parallelism from the losses of all ranks.

        Another divergence than L2 makes a step of its own ascent.

        Args:
            losses: (m,) the unweighted losses at x~.
            concepts: (m,) int64.

        Raises:
            DivergedError: a loss is not finite. On a GPU q becomes NaN instead, since looking would wait for it.
        """
        self._move_to(losses.device)
        sums, counts, squares = concept_totals(losses, concepts, len(self.q))
        if losses.device.type == "cpu" and not bool(torch.isfinite(sums).all()):
            raise DivergedError("a loss is not finite")
        total = counts.sum()
        mean = sums.sum() / total
        if self.baseline:
            lagged = mean if self._lagged_mean is None else self._lagged_mean
            squares = squares - 2 * lagged * sums + lagged.square() * counts
            sums = sums - lagged * counts
            self._lagged_mean = mean
        gradient = self._n_over_nk * sums / total - self.lam * self._divergence.gradient(self.q, self.reference)
        if self._c is None:
            self._measure(gradient)
            self.noise.learn(sums, squares, counts, 0.0)
            return
        t = self.step + 1
        rate = 1 / (self.lam * t * (self._c if t <= self.warmup_steps else 1.0))
        self.q = self._divergence.ascend(self.q, self.reference, rate * gradient)
        self.noise.learn(sums, squares, counts, self.lam * rate)
        self.step = t

    def _measure(self, gradient: Tensor) -> None:
        """Theorem 3's c, once enough gradients are seen."""
        self._norms.append(gradient.norm())
        if len(self._norms) == _BATCHES_FOR_MU:
            s = self.warmup_steps
            mu = torch.stack(self._norms).mean()
            self._c = (mu / self.lam * math.sqrt(math.log(s) / (2 * s))).clamp_min(1)
            self._norms = []

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`."""

        def kept(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.cpu().clone()

        return {
            "q": kept(self.q),
            "step": self.step,
            "c": self.c,
            "norms": [kept(norm) for norm in self._norms],
            "lagged_mean": kept(self._lagged_mean),
            "noise": self.noise.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a saved state.

        Raises:
            ValueError: the state is of another number of concepts.
        """
        if state["q"].shape != self.q.shape:
            raise ValueError(f"the state has {state['q'].numel()} concepts, this adversary {self.q.numel()}")
        device = self.q.device
        self.q = state["q"].double().to(device)
        self.step = int(state["step"])
        mean = state.get("lagged_mean")
        self._c = state.get("c", self._c)
        self._norms = [norm.to(device) for norm in state.get("norms", [])]
        self._lagged_mean = None if mean is None else mean.to(device)
        if "noise" in state:  # missing in earlier versions
            self.noise.load_state_dict(state["noise"])

    def _move_to(self, device: torch.device) -> None:
        if self.q.device != device:
            self.q, self.reference = self.q.to(device), self.reference.to(device)
            self._n_over_nk = self._n_over_nk.to(device)
            self._norms = [norm.to(device) for norm in self._norms]
            self._lagged_mean = None if self._lagged_mean is None else self._lagged_mean.to(device)
