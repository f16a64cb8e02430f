"""The oracles of the algorithm: each against something computed in another way."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from robustfeat.training.concepts import ConceptMap
from robustfeat.training.hrrl import ConceptAdversary, perturb, project_simplex
from robustfeat.training.network import build_network
from robustfeat.training.objective import Objective, StepBatch
from robustfeat.training.recipe import Recipe

COUNTS = torch.tensor([5000, 120, 33000, 777, 1])


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network(7)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3, 4, 6])


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
def test_perturb_moves_each_image_by_tau(network: nn.Module, batch, tau: float, size: int) -> None:
    images, labels = batch[0][:size], batch[1][:size]
    network.eval()
    moved = perturb(network, images, labels, tau)
    assert not moved.requires_grad
    np.testing.assert_allclose((moved - images).flatten(1).norm(dim=1), tau, rtol=1e-4)


def test_perturb_follows_the_gradient_of_each_image_alone(network: nn.Module, batch) -> None:
    network.eval().double()
    images, labels = batch[0].double(), batch[1]
    moved = perturb(network, images, labels, 0.5)
    for row in range(len(images)):
        x = images[row : row + 1].clone().requires_grad_()
        functional.cross_entropy(network(x), labels[row : row + 1]).backward()
        expected = images[row] + 0.5 * x.grad[0] / x.grad[0].norm()
        torch.testing.assert_close(moved[row], expected, rtol=1e-5, atol=1e-6)


def test_perturb_raises_each_loss_when_tau_is_small(network: nn.Module, batch) -> None:
    network.eval()
    images, labels = batch
    before = functional.cross_entropy(network(images), labels, reduction="none")
    after = functional.cross_entropy(network(perturb(network, images, labels, 0.05)), labels, reduction="none")
    assert (after > before).all()


def test_perturb_leaves_an_image_alone_when_its_gradient_is_zero(batch) -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * x.mean((2, 3)) + torch.tensor([1.0, 2.0, 3.0])

    images = batch[0]
    assert torch.equal(perturb(Constant(), images, torch.zeros(6, dtype=torch.long), 1.0), images)


def test_perturb_touches_neither_statistics_nor_gradients(network: nn.Module, batch) -> None:
    network.train()
    before = copy.deepcopy(network.state_dict())
    perturb(network, *batch, 1.0)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(m.track_running_stats for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_perturb_uses_batch_statistics_in_training_mode(network: nn.Module, batch) -> None:
    trained = perturb(network.train(), *batch, 1.0)
    evaluated = perturb(network.eval(), *batch, 1.0)
    assert not torch.allclose(trained, evaluated, atol=1e-3)


def numpy_adversary(counts, lam, s, c, batches):
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
    for expected, (losses, concepts) in zip(numpy_adversary(COUNTS, lam, 150, 7.0, batches), batches, strict=True):
        adversary.update(torch.from_numpy(losses), torch.from_numpy(concepts))
        np.testing.assert_allclose(adversary.q.numpy(), expected, atol=1e-6)
    assert adversary.step == 400


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
    "options", [{"lam": 0}, {"lam": math.inf}, {"lam": 1, "c": 0.5}, {"lam": 1, "reference": torch.ones(5)}]
)
def test_adversary_refuses_bad_arguments(options) -> None:
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
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4) for n in (network, plain)]
    generator = torch.Generator().manual_seed(9)
    for step in range(8):
        x = torch.randn(12, 3, 32, 32, generator=generator)
        y = torch.randint(0, 7, (12,), generator=generator)
        concepts = y % 3
        batch = StepBatch(x, y, concepts, step, len(y))
        losses = functional.cross_entropy(network(objective.training_images(network, batch)), y, reduction="none")
        assert torch.equal(objective.adversary.weights(concepts), torch.ones(12))
        optimizers[0].zero_grad()
        objective.training_loss(losses, batch).backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        functional.cross_entropy(plain(x), y, reduction="none").mean().backward()
        optimizers[1].step()
    for key, value in network.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key
