"""The oracles of the algorithm: each against something computed in another way."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from robustfeat.training.concepts import ConceptMap
from robustfeat.training.groupdro import GroupAdversary
from robustfeat.training.hrrl import (
    ConceptAdversary,
    input_gradient,
    perturb,
    project_simplex,
    step_along,
    step_by,
)
from robustfeat.training.network import FirstConv, build_network
from robustfeat.training.objective import Objective, StepBatch
from robustfeat.training.recipe import Recipe

COUNTS = torch.tensor([5000, 120, 33000, 777, 1])
Batch = tuple[torch.Tensor, torch.Tensor]
"""(6, 3, 32, 32) images and (6,) labels."""


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network(7, width=8)


def later_convolutions(network: nn.Module) -> int:
    """How many there are behind the first layer."""
    return sum(isinstance(module, nn.Conv2d) for module in network.modules()) - 1


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3, 4, 6])


@pytest.mark.parametrize("side", [(64, 64), (33, 48), (17, 9), (1, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_first_layer_has_the_gradients_of_an_ordinary_one(
    side: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    layer = FirstConv().to(dtype)
    images = torch.randn(3, 3, *side, dtype=dtype, requires_grad=True)
    expected = functional.conv2d(images, layer.weight, stride=2, padding=3)
    output = layer(images)
    gradient = torch.randn_like(output)
    assert torch.equal(output, expected)
    wanted = torch.autograd.grad(expected, [images, layer.weight], gradient)
    for got, reference in zip(torch.autograd.grad(output, [images, layer.weight], gradient), wanted, strict=True):
        torch.testing.assert_close(got, reference, rtol=tolerance, atol=tolerance * float(reference.abs().max()))


def test_first_layer_can_be_differentiated_twice() -> None:
    """As gradient penalties of methods of one's own do."""
    torch.manual_seed(0)
    layer = FirstConv().double()
    images = torch.randn(1, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[:, :2].tanh(), images)


@pytest.mark.parametrize("size", [1, 2, 11, 500])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_projection_meets_the_optimality_conditions(size: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(size)
    for _ in range(50):
        v = scale * torch.randn(size, generator=generator, dtype=torch.float64)
        w = project_simplex(v)
        assert (w >= 0).all()
        assert float(w.sum()) == pytest.approx(1, abs=1e-9)
        # KKT: one theta with w = v - theta where w > 0 and v - theta <= 0 elsewhere.
        theta = (v - w)[w > 0]
        assert float(theta.max() - theta.min()) <= 1e-9 * max(1, scale)
        assert (v[w == 0] <= theta.mean() + 1e-9 * max(1, scale)).all()


def test_projection_of_a_point_on_the_simplex_is_itself() -> None:
    point = torch.tensor([0.25, 0.5, 0.25, 0.0], dtype=torch.float64)
    assert torch.equal(project_simplex(point), point)


def test_projection_shares_ties_equally() -> None:
    assert torch.equal(project_simplex(torch.tensor([3.0, 3.0, -1.0])), torch.tensor([0.5, 0.5, 0.0]))


@pytest.mark.parametrize(
    "v", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([0.0, math.nan]), torch.tensor([math.inf])]
)
def test_projection_refuses_what_it_cannot_project(v: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="v must be"):
        project_simplex(v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert project_simplex(torch.tensor([0.3, 2.0], dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("tau", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("size", [1, 6])
def test_perturb_moves_each_image_by_tau(network: nn.Module, batch: Batch, tau: float, size: int) -> None:
    images, labels = batch[0][:size], batch[1][:size]
    network.eval()
    moved = perturb(network, images, labels, tau)
    assert not moved.requires_grad
    np.testing.assert_allclose((moved - images).flatten(1).norm(dim=1), tau, rtol=1e-4)


def test_perturb_follows_the_gradient_of_each_image_alone(network: nn.Module, batch: Batch) -> None:
    network.eval().double()
    images, labels = batch[0].double(), batch[1]
    moved = perturb(network, images, labels, 0.5)
    for row in range(len(images)):
        x = images[row : row + 1].clone().requires_grad_()
        functional.cross_entropy(network(x), labels[row : row + 1]).backward()
        assert x.grad is not None
        expected = images[row] + 0.5 * x.grad[0] / x.grad[0].norm()
        torch.testing.assert_close(moved[row], expected, rtol=1e-5, atol=1e-6)


def test_perturb_raises_each_loss_when_tau_is_small(network: nn.Module, batch: Batch) -> None:
    network.eval()
    images, labels = batch
    before = functional.cross_entropy(network(images), labels, reduction="none")
    after = functional.cross_entropy(network(perturb(network, images, labels, 0.05)), labels, reduction="none")
    assert (after > before).all()


def test_perturb_leaves_an_image_alone_when_its_gradient_is_zero(batch: Batch) -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * x.mean((2, 3)) + torch.tensor([1.0, 2.0, 3.0])

    images = batch[0]
    assert torch.equal(perturb(Constant(), images, torch.zeros(6, dtype=torch.long), 1.0), images)


def test_perturb_touches_neither_statistics_nor_gradients(network: nn.Module, batch: Batch) -> None:
    network.train()
    before = copy.deepcopy(network.state_dict())
    perturb(network, *batch, 1.0)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(m.track_running_stats for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_perturb_uses_batch_statistics_in_training_mode(network: nn.Module, batch: Batch) -> None:
    trained = perturb(network.train(), *batch, 1.0)
    evaluated = perturb(network.eval(), *batch, 1.0)
    assert not torch.allclose(trained, evaluated, atol=1e-3)


def test_perturb_at_half_resolution_follows_the_loss_of_the_shrunk_image(network: nn.Module, batch: Batch) -> None:
    """z is the gradient, with regard to the whole image, of the loss at means of 2 x 2 pixels."""
    network.eval()
    images, labels = batch
    small = images.reshape(6, 3, 16, 2, 16, 2).mean((3, 5)).requires_grad_()
    functional.cross_entropy(network(small), labels, reduction="sum").backward()
    assert small.grad is not None
    whole = small.grad.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = images + 0.5 * whole / whole.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(perturb(network, images, labels, 0.5, half=True), expected, rtol=1e-4, atol=1e-5)


def test_perturb_at_half_resolution_takes_odd_sides(network: nn.Module) -> None:
    images = torch.randn(2, 3, 33, 37)
    moved = perturb(network.eval(), images, torch.tensor([0, 1]), 2.0, half=True)
    np.testing.assert_allclose((moved - images).flatten(1).norm(dim=1), 2, rtol=1e-4)


def test_perturb_with_eval_statistics_in_training_mode(network: nn.Module, batch: Batch) -> None:
    expected = perturb(network.eval(), *batch, 1.0)
    network.train()
    before = copy.deepcopy(network.state_dict())
    torch.testing.assert_close(perturb(network, *batch, 1.0, batch_norm="eval"), expected)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(module.training for module in network.modules())


def test_perturb_in_pixels_adds_that_length_to_the_pixels(network: nn.Module, batch: Batch) -> None:
    """The reference differentiates with regard to the pixels, with the normalisation as a part of the network."""
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.1, 0.2, 0.4]).view(1, 3, 1, 1)
    network.eval()
    pixels, labels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(2)), batch[1]
    x = pixels.clone().requires_grad_()
    functional.cross_entropy(network((x - mean) / std), labels, reduction="sum").backward()
    assert x.grad is not None
    expected = pixels + 0.3 * x.grad / x.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = perturb(network, (pixels - mean) / std, labels, 0.3, std=std) * std + mean
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pixel", [False, True])
def test_perturb_without_normalisation_adds_tau_times_each_images_gradient(
    network: nn.Module, batch: Batch, pixel: bool
) -> None:
    """Theorem 2's own step; in pixels, with u = std x, of the gradient by u."""
    images, labels = batch
    std = torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1)
    scale = std if pixel else torch.ones(1, 3, 1, 1)
    u = (images * scale).requires_grad_()
    functional.cross_entropy(network(u / scale), labels, reduction="sum").backward()
    assert u.grad is not None
    found = perturb(network, images, labels, 0.7, unit=False, std=std if pixel else None)
    torch.testing.assert_close(found, ((u + 0.7 * u.grad) / scale).detach(), rtol=1e-4, atol=1e-3)
    assert (found - images).abs().max() > 0.05
    assert (found - images).flatten(1).norm(dim=1).std() > 0, "images move by lengths of their own"


def test_a_step_by_a_gradient_leaves_an_image_alone_whose_gradient_is_not_finite(batch: Batch) -> None:
    images, _ = batch
    gradient = torch.ones_like(images)
    gradient[0, 0, 0, 0] = torch.inf
    moved = step_by(images, gradient, 2.0)
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1:], images[1:] + 2)


def test_a_step_leaves_an_image_alone_whose_direction_is_not_finite(batch: Batch) -> None:
    images = batch[0]
    direction = torch.ones_like(images)
    direction[2, 0, 3, 3] = math.inf
    moved = step_along(images, direction, 1.0)
    assert torch.equal(moved[2], images[2])
    assert not torch.equal(moved[1], images[1])


class Backward(TorchDispatchMode):
    """Notes, for each convolution's backward pass, which gradients it computes: of input, weight, bias."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


def test_the_inner_pass_computes_no_gradients_of_parameters(network: nn.Module, batch: Batch) -> None:
    images, labels = batch
    with Backward() as inner:
        input_gradient(network, images, labels)
    later = later_convolutions(network)
    assert inner.masks == [[True, False, False]] * later  # the first layer's is a convolution of its own: `FirstConv`
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    with Backward() as whole:
        functional.cross_entropy(network(images), labels).backward()
    assert sorted(whole.masks) == [[False, True, False]] + [[True, True, False]] * later


def test_a_compiled_inner_pass_computes_no_gradients_of_parameters(network: nn.Module, batch: Batch) -> None:
    """Read off the graphs that a compiler gets: which of input, weight and bias each convolution's backward gives."""
    masks: list[list[bool]] = []
    later = later_convolutions(network)

    def look(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[[list[Any]], Any]:
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.convolution_backward.default:
                masks.append(list(node.args[-1]))
        boxed: Callable[[list[Any]], Any] = make_boxed_func(graph.forward)
        return boxed

    torch._dynamo.reset()
    model = torch.compile(network, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    assert isinstance(model, nn.Module)
    images, labels = batch
    moved = step_along(images, input_gradient(model, images, labels), 1.0)
    assert masks == [[True, False, False]] * later
    torch.testing.assert_close(moved, perturb(network, images, labels, 1.0), rtol=1e-3, atol=1e-3)
    masks.clear()
    functional.cross_entropy(model(images), labels).backward()
    assert sorted(masks) == [[False, True, False]] + [[True, True, False]] * later
    masks.clear()
    input_gradient(model, images, labels)
    assert not masks  # nothing is compiled again


def numpy_adversary(
    counts: np.ndarray, lam: float, s: int, c: float, batches: list[tuple[np.ndarray, np.ndarray]]
) -> list[np.ndarray]:
    """Eq. 6 and Algorithm 1 once more, in NumPy; the projection by bisection instead of sorting."""
    n_k = np.asarray(counts, float)
    q0 = n_k / n_k.sum()
    q = q0.copy()
    path = []
    for t, (losses, concepts) in enumerate(batches, start=1):
        rate = 1 / (c * lam * t) if t <= s else 1 / (lam * t)
        g = np.zeros_like(q)
        for k in range(len(q)):
            g[k] = (losses[concepts == k] * n_k.sum() / n_k[k]).sum() / len(losses) - lam * (q[k] - q0[k])
        v = q + rate * g
        low, high = v.min() - 1, v.max()
        for _ in range(200):
            middle = (low + high) / 2
            if np.maximum(v - middle, 0).sum() > 1:
                low = middle
            else:
                high = middle
        q = np.maximum(v - high, 0)
        path.append(q)
    return path


@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0, 1000.0])
def test_adversary_equals_a_numpy_transcription_over_hundreds_of_steps(lam: float) -> None:
    rng = np.random.default_rng(3)
    shares = COUNTS.numpy() / COUNTS.sum().item()
    batches = [(rng.gamma(2.0, 1.0, 64), rng.choice(5, 64, p=shares)) for _ in range(400)]
    adversary = ConceptAdversary(COUNTS, lam, warmup_steps=150, c=7.0)
    for expected, (losses, concepts) in zip(
        numpy_adversary(COUNTS.numpy(), lam, 150, 7.0, batches), batches, strict=True
    ):
        adversary.update(torch.from_numpy(losses), torch.from_numpy(concepts))
        np.testing.assert_allclose(adversary.q.numpy(), expected, atol=1e-6)
    assert adversary.step == 400


def random_batches(steps: int, size: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = np.random.default_rng(4)
    shares = COUNTS.numpy() / COUNTS.sum().item()
    return [
        (torch.from_numpy(rng.gamma(2.0, 1.0, size)), torch.from_numpy(rng.choice(5, size, p=shares)))
        for _ in range(steps)
    ]


def test_c_auto_is_theorem_3s() -> None:
    lam, s = 0.5, 400
    batches = random_batches(12)
    adversary = ConceptAdversary(COUNTS, lam, warmup_steps=s, c="auto")
    n_k, norms = COUNTS.numpy().astype(float), []
    for losses, concepts in batches[:10]:
        assert adversary.c is None
        sums = np.array([losses[concepts == k].sum() for k in range(5)])
        norms.append(np.linalg.norm(n_k.sum() / n_k * sums / 64))
        adversary.update(losses, concepts)
        assert torch.equal(adversary.q, adversary.reference)
    assert adversary.c == pytest.approx(np.mean(norms) / lam * math.sqrt(math.log(s) / (2 * s)))
    assert adversary.step == 0
    assert adversary.c is not None
    known = ConceptAdversary(COUNTS, lam, warmup_steps=s, c=adversary.c)
    for losses, concepts in batches[10:]:
        adversary.update(losses, concepts)
        known.update(losses, concepts)
    torch.testing.assert_close(adversary.q, known.q)


def test_the_baseline_changes_nothing_where_the_batch_has_the_shares_of_the_set() -> None:
    """One constant is added to each component of the gradient, and the projection takes it out."""
    counts = torch.tensor([10, 20, 30])
    concepts = torch.tensor([0, 1, 1, 2, 2, 2])
    plain, lagged = ConceptAdversary(counts, 2.0, 5), ConceptAdversary(counts, 2.0, 5, baseline=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        losses = torch.rand(6, generator=generator) + 3
        plain.update(losses, concepts)
        lagged.update(losses, concepts)
        torch.testing.assert_close(plain.q, lagged.q)


def test_the_baseline_calms_q() -> None:
    """Losses that are all alike should leave q at rest; what moves it is the batches' uneven shares."""
    far = {}
    for baseline in (False, True):
        adversary = ConceptAdversary(COUNTS[:4], 1.0, warmup_steps=100, baseline=baseline)
        distance = 0.0
        for _, concepts in random_batches(100):
            adversary.update(torch.full((64,), 4.0), concepts.clamp_max(3))
            distance += float((adversary.q - adversary.reference).norm())
        far[baseline] = distance
    assert far[True] < 1e-9
    assert far[False] > 1


def test_a_reference_of_ones_own_is_where_q_starts_and_what_pulls_it() -> None:
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])
    adversary = ConceptAdversary(COUNTS, 1e9, reference=reference)
    weights = adversary.weights(torch.arange(5))
    torch.testing.assert_close(weights, (COUNTS.sum() / COUNTS * reference).float())
    for losses, concepts in random_batches(20):
        adversary.update(losses, concepts)
    torch.testing.assert_close(adversary.q, reference.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{"c": "auto"}, {}, {"baseline": True}])
@pytest.mark.parametrize("cut", [4, 13])
def test_every_kind_of_adversary_goes_on_from_its_state(options: dict[str, Any], cut: int) -> None:
    whole, first, second = (ConceptAdversary(COUNTS, 1.0, warmup_steps=7, **options) for _ in range(3))
    batches = random_batches(25)
    for batch in batches:
        whole.update(*batch)
    for batch in batches[:cut]:
        first.update(*batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[cut:]:
        second.update(*batch)
    assert torch.equal(whole.q, second.q)


def test_the_state_of_an_earlier_version_is_read() -> None:
    """It also held the iterate, which was q."""
    whole, first, second = (ConceptAdversary(COUNTS, 1.0, warmup_steps=7) for _ in range(3))
    batches = random_batches(9)
    for batch in batches:
        whole.update(*batch)
    for batch in batches[:4]:
        first.update(*batch)
    second.load_state_dict({**first.state_dict(), "iterate": first.q.clone()})
    for batch in batches[4:]:
        second.update(*batch)
    assert torch.equal(whole.q, second.q)


def test_weigh_gives_the_weights_before_the_update() -> None:
    adversary, updated = ConceptAdversary(COUNTS, 1.0), ConceptAdversary(COUNTS, 1.0)
    for losses, concepts in random_batches(5):
        before = updated.weights(concepts)
        updated.update(losses, concepts)
        assert torch.equal(adversary.weigh(losses, concepts), before)
        assert torch.equal(adversary.q, updated.q)


def test_groups_follow_a_numpy_transcription_of_groupdro() -> None:
    adversary = GroupAdversary(5, rate=0.1)
    q = np.full(5, 0.2)
    for losses, concepts in random_batches(50):
        means = np.array([losses[concepts == k].mean() if (concepts == k).any() else 0.0 for k in range(5)])
        q = q * np.exp(0.1 * means)
        q /= q.sum()
        weights = adversary.weigh(losses, concepts)
        np.testing.assert_allclose(adversary.q, q, rtol=1e-9)
        descended = float((weights * losses).mean())
        assert descended == pytest.approx(float(q @ means), rel=1e-6)


def test_weights_are_exactly_one_at_the_start() -> None:
    counts = torch.randint(1, 10_000, (1000,), generator=torch.Generator().manual_seed(0))
    weights = ConceptAdversary(counts, 1.0).weights(torch.arange(1000))
    assert torch.equal(weights, torch.ones(1000))
    assert weights.dtype == torch.float32


def test_adversary_goes_on_from_its_state() -> None:
    generator = torch.Generator().manual_seed(5)
    losses, concepts = torch.rand(20, 32, generator=generator), torch.randint(0, 5, (20, 32), generator=generator)
    whole, first, second = (ConceptAdversary(COUNTS, 1.0, warmup_steps=7) for _ in range(3))
    for step in range(20):
        whole.update(losses[step], concepts[step])
    for step in range(9):
        first.update(losses[step], concepts[step])
    second.load_state_dict(first.state_dict())
    for step in range(9, 20):
        second.update(losses[step], concepts[step])
    assert torch.equal(whole.q, second.q)


def test_adversary_settles_at_the_maximiser_of_equation_4() -> None:
    """For fixed losses L, Eq. 4 is maximal at q0 + (L - mean L) / lambda, if that is on the simplex."""
    adversary = ConceptAdversary(torch.tensor([100, 100]), 2.0, warmup_steps=0)
    for _ in range(200):
        adversary.update(torch.tensor([2.0, 1.0]), torch.tensor([0, 1]))
    torch.testing.assert_close(adversary.q, torch.tensor([0.75, 0.25], dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"lam": 0},
        {"lam": math.inf},
        {"lam": 1, "c": 0.5},
        {"lam": 1, "c": "best"},
        {"lam": 1, "c": "auto", "warmup_steps": 1},
        {"lam": 1, "reference": torch.ones(5)},
    ],
)
def test_adversary_refuses_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        ConceptAdversary(COUNTS, **options)


def test_adversary_refuses_concepts_without_examples() -> None:
    with pytest.raises(ValueError, match="drop concepts without examples"):
        ConceptAdversary(torch.tensor([3, 0]), 1.0)


def test_h_of_s_peaks_where_figure_2_says() -> None:
    s = np.arange(2, 20_000)
    peaks = [int(s[np.argmax(mu * np.sqrt(np.log(s) / 2) - np.sqrt(s))]) for mu in (100, 150, 200, 300)]
    assert peaks == [755, 1534, 2550, 5253]
    assert peaks[0] < Recipe().q_warmup_steps < peaks[-1]


def test_huge_lambda_without_perturbation_is_plain_sgd_bit_for_bit(network: nn.Module) -> None:
    plain = copy.deepcopy(network)
    recipe = Recipe(tau=0.0, lam=1e12)
    concepts_of = ConceptMap(("a", "b", "c"), np.arange(7) % 3, np.array([300, 200, 11, 100, 100, 0, 100]))
    objective = Objective(recipe, concepts_of)
    adversary = objective.adversary
    assert isinstance(adversary, ConceptAdversary)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4) for n in (network, plain)]
    generator = torch.Generator().manual_seed(9)
    for step in range(8):
        x = torch.randn(12, 3, 32, 32, generator=generator)
        y = torch.randint(0, 7, (12,), generator=generator)
        concepts = y % 3
        batch = StepBatch(x, y, concepts, step, len(y))
        losses = functional.cross_entropy(network(objective.training_images(network, batch)), y, reduction="none")
        assert torch.equal(adversary.weights(concepts), torch.ones(12))
        optimizers[0].zero_grad()
        objective.training_loss(losses, batch).backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        functional.cross_entropy(plain(x), y, reduction="none").mean().backward()
        optimizers[1].step()
    for key, value in network.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key
