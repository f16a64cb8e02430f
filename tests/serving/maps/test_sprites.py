"""Thumbnails: the right ones, bounded in size, decoded where a crash costs one image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.serving.inputs.sources import ImageSource
from robustfeat.serving.maps.sprites import SIDES, Sprites, draw_sprites, plan_sprites
from tests.serving.maps.conftest import colour_of


def sources(*places: Path) -> dict[int, ImageSource]:
    with list_inputs(places) as found:
        return dict(enumerate(found))


def squares(sprites: Sprites) -> dict[int, np.ndarray]:
    """The thumbnail of each point, (side, side, 3)."""
    side, columns = sprites.side, sprites.columns
    sheets = [np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB")) for sheet in sprites.sheets]
    found = {}
    for at, row in enumerate(sprites.rows.tolist()):
        sheet, place = divmod(at, columns * columns)
        top, left = place // columns * side, place % columns * side
        found[row] = sheets[sheet][top : top + side, left : left + side]
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """30 images, of which one is no image and one crashes no one though its size is absurd."""
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(30):
        Image.new("RGB", (200, 100), colour_of(row)).save(folder / f"{row:02}.png")
    (folder / "07.png").write_bytes(b"no image")
    return folder


def test_each_point_has_the_thumbnail_of_its_image(images: Path) -> None:
    chosen = np.random.default_rng(0).permutation(30)
    found = draw_sprites(sources(images), chosen, 96, 10**7, workers=2, quiet=True)
    assert found.failed == 1
    assert found.rows.tolist() == [row for row in chosen.tolist() if row != 7]
    for row, square in squares(found).items():
        assert square.shape == (96, 96, 3)
        assert np.abs(square.mean((0, 1)) - colour_of(row)).max() < 6


def test_tars_and_parquet_files_give_the_same_thumbnails(images: Path, tmp_path: Path) -> None:
    import tarfile

    names = sorted(images.iterdir())
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for name in names:
            archive.add(name, name.name)
    cells = pa.array([{"bytes": name.read_bytes(), "path": name.name} for name in names])
    parquet.write_table(pa.table({"image": cells}), tmp_path / "images.parquet", row_group_size=7)
    chosen = np.arange(30)[::-1].copy()
    wanted = draw_sprites(sources(images), chosen, 64, 10**7, workers=1, quiet=True)
    for place in ("images.tar", "images.parquet"):
        found = draw_sprites(sources(tmp_path / place), chosen, 64, 10**7, workers=1, quiet=True)
        assert found.sheets == wanted.sheets
        assert found.failed == 1


def test_the_side_goes_down_and_then_thumbnails_are_left_out() -> None:
    places = np.random.default_rng(0).uniform(size=(10_000, 2)).astype(np.float32)
    wanted = np.arange(10_000)
    sides = [plan_sprites(places, wanted, limit)[0] for limit in (10**9, 50 * 10**6, 20 * 10**6, 9 * 10**6, 10**6)]
    assert sides == [128, 96, 64, 48, 48]
    assert set(sides) == set(SIDES)
    _, some = plan_sprites(places, wanted, 10**6)
    assert 1000 < len(some) < 1300
    # Those that are left are spread over the whole map.
    cells, _, _ = np.histogram2d(places[some, 0], places[some, 1], bins=np.linspace(0, 1, 9))
    assert cells.min() > 5
    assert len(plan_sprites(places, wanted, 10)[1]) == 0


def test_neighbours_on_the_map_are_on_the_same_sheets() -> None:
    places = np.random.default_rng(0).uniform(size=(4096, 2)).astype(np.float32)
    _, ordered = plan_sprites(places, np.arange(4096), 10**9)
    sheets = places[ordered].reshape(16, 256, 2)
    # 16 sheets: most cover a small part of the map. In another order each would cover all of it.
    assert np.median(np.ptp(sheets, 1).max(1)) < 0.45


def test_the_size_in_the_page_is_bounded_for_images_that_do_not_compress(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for row in range(40):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)).save(tmp_path / f"{row:02}.png")
    limit = 60_000
    found = draw_sprites(sources(tmp_path), np.arange(40), 96, limit, workers=1, quiet=True)
    assert sum(4 * -(-len(sheet) // 3) for sheet in found.sheets) <= limit
    assert 3 < len(found.rows) < 40
    assert len(squares(found)) == len(found.rows)
