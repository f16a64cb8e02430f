"""The picture of a run's metrics. A run with its picture: test_a_run_shows_what_it_did in test_trainer.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from robustfeat.training.loop.curves import draw_curves


def draw(folder: Path, concepts: int, loss: float = 2.0, noisy_steps: int = 0) -> NDArray[np.uint8]:
    """(H, W, 3), the picture of 8 steps and 2 epochs, with so many shares of q, the first steps' mostly noise."""
    lines: list[dict[str, object]] = [
        {"event": "epoch", "step": 4 * epoch, "epoch": epoch, "validation_loss": 1.0, "validation_accuracy": 0.5}
        for epoch in (1, 2)
    ]
    for step in range(1, 9):
        q: dict[str, object] = {"weight_signal": 0.2, "weight_noise": 0.3 if step <= noisy_steps else 0.1}
        q |= {"q": [(number + step) % concepts / concepts for number in range(concepts)]} if concepts else {}
        lines.append(
            {"event": "train", "step": step, "epoch": step / 4, "loss": loss / step, "accuracy": step / 10} | q
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(folder, [f"concept {number}" for number in range(concepts or 3)])
    with Image.open(folder / "curves.png") as image:
        return np.asarray(image.convert("RGB"))


def blue(pixels: NDArray[np.uint8]) -> int:
    """How many pixels are of matplotlib's first colour, or blended of it and white."""
    return int((pixels[..., 2].astype(int) - pixels[..., 0] > 40).sum())


def green(pixels: NDArray[np.uint8]) -> int:
    """How many are of its third colour, or blended of it and white."""
    return int((pixels[..., 1].astype(int) - np.maximum(pixels[..., 0], pixels[..., 2]) > 30).sum())


def test_a_run_without_q_has_two_parts(tmp_path: Path) -> None:
    picture = draw(tmp_path, 0)
    assert picture.shape[1] == 990
    loss, accuracy = picture[:, :495], picture[:, 495:]
    assert min(blue(loss), blue(accuracy)) > 300
    assert green(picture) == 0


@pytest.mark.parametrize("concepts", [11, 31])  # named beside the lines, and too many for that
def test_q_has_a_part_of_its_own(tmp_path: Path, concepts: int) -> None:
    picture = draw(tmp_path, concepts)
    assert picture.shape[1] == 1430
    assert green(picture) > 100


def test_steps_with_more_noise_than_signal_are_grey(tmp_path: Path) -> None:
    grey = []
    for steps in (0, 3, 6):
        distance = np.abs(draw(tmp_path, 31, noisy_steps=steps) - 0.9 * 255)
        grey.append(int((distance < 1).all(2).sum()))
    assert grey[1] - grey[0] > 10_000
    assert grey[2] - grey[0] == pytest.approx(2 * (grey[1] - grey[0]), rel=0.1)


def test_losses_that_are_not_numbers_are_left_out(tmp_path: Path) -> None:
    picture = draw(tmp_path, 0, float("nan"))
    loss, accuracy = picture[:, :495], picture[:, 495:]
    assert blue(loss) < 0.5 * blue(accuracy)  # the legend alone
