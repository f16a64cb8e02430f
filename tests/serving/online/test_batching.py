"""Batches: who waits for whom, and what becomes of those who leave."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from robustfeat import FeatureExtractor
from robustfeat.hub.preprocessing import normalise
from robustfeat.serving.http.process.metrics import Metrics
from robustfeat.serving.online.batching import Batcher
from tests.serving.http.conftest import blank_webp


class Model:
    """An extractor whose model waits to be let go, and remembers the sizes of its batches."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self._extractor = extractor
        self.gate = threading.Event()
        self.sizes: list[int] = []
        self.fail: Callable[[NDArray[np.float32]], bool] = lambda values: False
        self.config, self.decoding, self.batch_size, self.engine = extractor.config, "exact", 8, self

    def new_input(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return np.empty(shape, np.float32)

    def run(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        self.gate.wait(30)
        if self.fail(values):
            raise RuntimeError("out of memory")
        self.sizes.append(len(values))
        return self._extractor.engine.run(values)


@pytest.fixture
def model(extractor: FeatureExtractor) -> Model:
    return Model(extractor)


@pytest.fixture
def play(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Batcher], Awaitable[Any]]], Any]:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))

    def run(scene: Callable[[Batcher], Awaitable[Any]]) -> Any:
        async def played() -> Any:
            metrics, limits = Metrics(0).of_model("m"), {"max_pixels": 10**8, "decode_timeout_s": 10.0}
            with Batcher(model, metrics, **limits, decoders=2, batch_size=8) as batcher:  # type: ignore[arg-type]
                batcher.attach()
                return await scene(batcher)

        return asyncio.run(played())

    return run


Play = Callable[[Callable[[Batcher], Awaitable[Any]]], Any]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_batch_forms_while_the_model_is_busy(
    play: Play, model: Model, photos: list[bytes], extractor: FeatureExtractor
) -> None:
    async def scene(batcher: Batcher) -> list[Any]:
        first = asyncio.create_task(batcher.embed(photos[:1]))
        await until(lambda: batcher._busy)
        rest = [asyncio.create_task(batcher.embed([photo])) for photo in photos[1:6]]
        await until(lambda: len(batcher._ready) == 5)
        model.gate.set()
        return [answer.features for task in [first, *rest] for answer in await task]

    rows = play(scene)
    assert model.sizes == [1, 5]
    np.testing.assert_allclose(rows, extractor.embed(photos[:6]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_who_leaves_while_waiting_frees_the_room(
    play: Play, model: Model, photos: list[bytes], extractor: FeatureExtractor
) -> None:
    (value,) = normalise(extractor.prepare(photos[1])[None], extractor.config.preprocessing)

    async def scene(batcher: Batcher) -> list[Any]:
        # A tensor has no place, so that nothing becomes free when the model has done with it.
        busy = asyncio.create_task(batcher.embed([value]))
        await until(lambda: batcher._busy)
        # More than there are places for; all of them leave when the places are full.
        leaving = [asyncio.create_task(batcher.embed(photos[:8])) for _ in range(8)]
        await until(lambda: not batcher._places)
        for task in leaving:
            task.cancel()
        staying = asyncio.create_task(batcher.embed(photos[:3]))
        await asyncio.gather(*leaving, return_exceptions=True)
        model.gate.set()
        await busy
        async with asyncio.timeout(10):
            return await staying

    assert len(play(scene)) == 3
    assert sum(model.sizes) == 4


def test_large_images_of_one_key_do_not_delay_the_others(play: Play, model: Model, photos: list[bytes]) -> None:
    large = blank_webp(5500, 5500)  # half a second each
    model.gate.set()

    async def scene(batcher: Batcher) -> float:
        bulk = asyncio.create_task(batcher.embed([large] * 16, "bulk"))
        await until(lambda: batcher._large == 1)
        began = time.monotonic()
        for photo in photos[:5]:
            (answer,) = await batcher.embed([photo], "other")
            assert answer.features is not None
        passed = time.monotonic() - began
        assert not bulk.done()
        bulk.cancel()
        return passed

    assert play(scene) < 3


def test_images_that_take_long_are_answered_like_the_others(
    play: Play, model: Model, photos: list[bytes], extractor: FeatureExtractor
) -> None:
    large, medium = blank_webp(5500, 5500), blank_webp(3000, 2000)
    images = [photos[0], medium, photos[1], large, photos[2], b"no image", medium, blank_webp(11_000, 10_000)]
    model.gate.set()

    async def scene(batcher: Batcher) -> list[Any]:
        return await batcher.embed(images)

    answers = play(scene)
    assert [answer.problem for answer in answers[:5]] == [None] * 5
    assert "not an image" in answers[5].problem
    assert answers[7].problem == "11000 x 10000 is over the limit of 100,000,000 pixels"
    expected = extractor.embed([photos[0], medium, photos[1], large, photos[2], medium])
    found = [answer.features for answer in answers if answer.features is not None]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_failure_of_the_model_costs_the_image_that_has_it(
    play: Play, model: Model, photos: list[bytes], extractor: FeatureExtractor
) -> None:
    squares = np.stack([extractor.prepare(photo) for photo in photos[:4]])
    values = normalise(squares, extractor.config.preprocessing)
    model.fail = lambda batch: any(np.array_equal(row, values[2]) for row in batch)
    model.gate.set()

    async def scene(batcher: Batcher) -> list[Any]:
        return await batcher.embed(list(values))

    answers = play(scene)
    assert isinstance(answers[2].failure, RuntimeError)
    np.testing.assert_allclose(
        [answers[at].features for at in (0, 1, 3)],
        extractor.embed([photos[at] for at in (0, 1, 3)]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_images_and_tensors_share_a_batch(
    play: Play, model: Model, photos: list[bytes], extractor: FeatureExtractor
) -> None:
    (value,) = normalise(extractor.prepare(photos[1])[None], extractor.config.preprocessing)

    async def scene(batcher: Batcher) -> list[Any]:
        first = asyncio.create_task(batcher.embed(photos[3:4]))
        await until(lambda: batcher._busy)
        mixed = asyncio.create_task(batcher.embed([photos[0], value, b"no image", photos[2]]))
        await until(lambda: len(batcher._ready) == 3)
        model.gate.set()
        await first
        return await mixed

    answers = play(scene)
    assert model.sizes == [1, 3]
    assert "not an image" in answers[2].problem
    np.testing.assert_allclose(
        [answers[at].features for at in (0, 1, 3)], extractor.embed(photos[:3]), rtol=1e-4, atol=1e-5
    )
