"""Draws the figure of docs/hrrl.md, docs/images/hrrl.svg: both levels of HRRL on a problem small enough to see.

    python benchmarks/hrrl_figure.py

Left: images are points in a plane, and the model is a line. Each point moves by tau along the gradient of its own
loss, as `robustfeat.training.hrrl.perturb` moves an image. Right: the q that is worst for given losses of five
concepts, which Eq. 4 bounds by lambda. It is the projection of q0 + L / lambda onto the simplex.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from robustfeat.training.divergences import project_simplex
from robustfeat.training.hrrl import perturb

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "hrrl.svg"
NORMAL, TAU = (1.0, 0.45), 0.34  # of the line, and the length of a move
CONCEPTS = ("dogs", "birds", "vehicles", "food", "tools")
COUNTS, LOSSES, LAMBDA = (120, 60, 70, 30, 20), (1.0, 1.3, 1.1, 1.2, 2.4), 12.0
SIDE, LEFT, TOP, GAP, ROW = 250, 20, 56, 170, 42

_STYLE = """\
text { font: 13px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #222 }
.strong { font-weight: 600 } .line { stroke: #555; stroke-width: 1.5 } .move { stroke: #555; stroke-width: 1.2 }
.first { fill: #0072b2 } .second { fill: #d55e00 } .before { fill: #9a9fa6 } .moved { fill-opacity: 0.35 }
@media (prefers-color-scheme: dark) { text { fill: #e8e8e8 } .line, .move { stroke: #bbb }
.first { fill: #56b4e9 } .second { fill: #e69f00 } .before { fill: #777c84 } }"""


def points() -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """(n, 2) points from -1 to 1 that the line parts, their (n,) classes, and the (n, 2) points moved by tau."""
    rng = np.random.default_rng(3)
    found = rng.uniform(-0.85, 0.85, (400, 2))
    side = found @ NORMAL
    kept = found[np.abs(side) > 0.15]
    apart: list[NDArray[np.float64]] = []
    for point in kept:
        if all(np.linalg.norm(point - other) > 0.46 for other in apart):
            apart.append(point)
    placed = np.array(apart)
    labels = (placed @ NORMAL > 0).astype(np.int64)
    line = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        line.weight.copy_(torch.tensor([[-n for n in NORMAL], NORMAL]))
    model = nn.Sequential(nn.Flatten(), line)
    images = torch.from_numpy(placed).reshape(-1, 2, 1, 1)
    moved = perturb(model, images, torch.from_numpy(labels), TAU).reshape(-1, 2).numpy()
    return placed, labels, moved


def weights() -> list[float]:
    """(N / N_k) q_k of each concept."""
    start = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    worst = project_simplex(start + torch.tensor(LOSSES, dtype=torch.float64) / LAMBDA)
    return [float(weight) for weight in worst / start]


def example_level() -> list[str]:
    """The left panel."""

    def place(point: NDArray[np.float64]) -> tuple[float, float]:
        return round(LEFT + SIDE * (1 + point[0]) / 2, 1), round(TOP + SIDE * (1 - point[1]) / 2, 1)

    lines = [f'<text x="{LEFT}" y="22" class="strong">Example level</text>']
    lines.append(f'<text x="{LEFT}" y="42">each image moves by tau to a larger loss</text>')
    end = np.array([-NORMAL[1] / NORMAL[0], 1.0])
    (x1, y1), (x2, y2) = place(end), place(-end)
    lines.append(f'<line class="line" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke-dasharray="5 4"/>')
    for before, label, after in zip(*points(), strict=True):
        (x1, y1), (x2, y2) = place(before), place(after)
        kind = "second" if label else "first"
        lines.append(f'<line class="move" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')
        lines.append(f'<circle class="{kind}" cx="{x1}" cy="{y1}" r="5"/>')
        lines.append(f'<circle class="{kind} moved" cx="{x2}" cy="{y2}" r="5"/>')
    return lines


def concept_level() -> list[str]:
    """The right panel."""
    x0 = LEFT + SIDE + GAP
    lines = [f'<text x="{x0 - 90}" y="22" class="strong">Concept level</text>']
    lines.append(f'<text x="{x0 - 90}" y="42">weight of an image, by its concept</text>')
    unit = 110
    for row, (name, loss, weight) in enumerate(zip(CONCEPTS, LOSSES, weights(), strict=True)):
        y = TOP + 14 + row * ROW
        lines.append(f'<text x="{x0 - 10}" y="{y + 5}" text-anchor="end" class="strong">{escape(name)}</text>')
        lines.append(f'<text x="{x0 - 10}" y="{y + 20}" text-anchor="end">loss {loss}</text>')
        kind = "second" if weight > 1 else "first"
        lines.append(
            f'<rect class="{kind}" x="{x0}" y="{y - 6}" width="{round(unit * weight, 1)}" height="24" rx="2"/>'
        )
        lines.append(f'<text x="{round(x0 + unit * max(weight, 1) + 8, 1)}" y="{y + 11}">{weight:.2f}</text>')
    bottom = TOP + len(CONCEPTS) * ROW
    lines.append(
        f'<line class="line" x1="{x0 + unit}" y1="{TOP}" x2="{x0 + unit}" y2="{bottom}" stroke-dasharray="5 4"/>'
    )
    lines.append(f'<text x="{x0 + unit}" y="{bottom + 18}" text-anchor="middle">1 = ERM</text>')
    return lines


def figure() -> str:
    """The SVG."""
    width, height = LEFT + SIDE + GAP + 320, TOP + SIDE + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">\n<title>The two levels of HRRL</title>\n<style>\n{_STYLE}\n</style>\n'
        + "\n".join([*example_level(), *concept_level()])
        + "\n</svg>\n"
    )


def main() -> None:
    FIGURE.write_text(figure(), "utf-8")


if __name__ == "__main__":
    main()
