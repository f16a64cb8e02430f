"""What a map costs: layouts by several libraries, and how long a browser needs for a picture of many points.

    python benchmarks/map.py layout FEATS.npy --rows 5000 --method opentsne|sklearn|umap|pacmap --out layout.json
    python benchmarks/map.py page --points 100000 --out page.json

- layout: seconds and processor seconds of one library on the features' 50 principal components, which `robustfeat map`
  takes, too, and the share of each row's 10 nearest neighbours by cosine that are among its 10 nearest on the map.
- page: a map of random points in headless Chromium: milliseconds from frame to frame while it is moved, at three
  zooms. Headless Chromium draws without a graphics processor.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from machine import hardware
from robustfeat.serving.heads.features import Features
from robustfeat.serving.maps.colourings import Colouring, categories_of
from robustfeat.serving.maps.document import CollectionMap, write_page
from robustfeat.serving.maps.layout import to_unit_square
from robustfeat.serving.maps.reduction import reduce_features

_PACKAGES = {"opentsne": "openTSNE", "sklearn": "scikit-learn", "umap": "umap-learn", "pacmap": "pacmap"}
_FRAMES = """
async ([zoom, frames]) => {
  const times = [];
  let last = 0;
  for (let frame = 0; frame < frames; frame++) {
    const now = await new Promise(requestAnimationFrame);
    if (frame > 1) times.push(now - last);
    last = now;
    robustfeatMap.look(0.45 + 0.002 * frame, 0.5, zoom);
  }
  return times;
}
"""


def lay_out(reduced: NDArray[np.float32], method: str, threads: int) -> Any:
    """Places by one library at its defaults, started from the first two components."""
    start = reduced[:, :2] / reduced[:, 0].std()
    if method == "opentsne":
        from openTSNE import TSNE

        return TSNE(n_jobs=threads, random_state=0, initialization=start.astype(float) * 1e-4).fit(reduced)
    if method == "sklearn":
        from sklearn.manifold import TSNE as OTHER

        return OTHER(init=start * 1e-4, random_state=0, n_jobs=threads).fit_transform(reduced)
    if method == "umap":
        from umap import UMAP

        return UMAP(random_state=0, init=start * 10).fit_transform(reduced)
    from pacmap import PaCMAP

    return PaCMAP(random_state=0, apply_pca=False).fit_transform(reduced, init=start)


def kept_neighbours(values: NDArray[np.float32], places: NDArray[np.float32], count: int = 10) -> float:
    """The mean over 1,000 rows."""
    units = values / np.linalg.norm(values, axis=1, keepdims=True)
    shares = []
    for row in np.random.default_rng(1).permutation(len(values))[:1000]:
        before = np.argpartition(-(units @ units[row]), count + 1)[: count + 1]
        after = np.argpartition(((places - places[row]) ** 2).sum(1), count + 1)[: count + 1]
        shares.append(len(set(before) & set(after) - {row}) / count)
    return float(np.mean(shares))


def layout(options: argparse.Namespace) -> dict[str, Any]:
    values = np.load(options.features, mmap_mode="r")
    rows = np.sort(np.random.default_rng(0).permutation(len(values))[: options.rows])
    some = np.asarray(values[rows], np.float32)
    features = Features("", some, [""] * len(some), {}, None)
    reduced = reduce_features(features, np.arange(len(some)))
    began, used = time.monotonic(), time.process_time()
    places = to_unit_square(lay_out(reduced, options.method, options.threads))
    return {
        "method": f"{_PACKAGES[options.method]} {version(_PACKAGES[options.method])}",
        "rows": len(some),
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        "kept_neighbours": round(kept_neighbours(some, places), 3),
    }


def page(options: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.browser import open_browser, visit

    rng = np.random.default_rng(0)
    middles = rng.uniform(size=(40, 2))
    groups = rng.integers(0, 40, options.points)
    places = to_unit_square(middles[groups] + rng.normal(0, 0.03, (options.points, 2)))
    labels = categories_of("label", [f"group {group}" for group in groups.tolist()])
    numbers = Colouring("number", rng.uniform(size=options.points).astype(np.float32))
    paths = tuple(f"folder/{row:07}.jpg" for row in range(options.points))
    found: dict[str, Any] = {"points": options.points}
    with tempfile.TemporaryDirectory() as scratch, open_browser() as browser:
        file = Path(scratch) / "map.html"
        found["mb"] = round(write_page(CollectionMap("", "", paths, places, (labels, numbers)), file) / 1e6, 1)
        with visit(browser, file) as seen:
            for zoom in (1, 3, 10):
                times = np.array(seen.page.evaluate(_FRAMES, [zoom, 62]))
                found[f"zoom_{zoom}_ms"] = {
                    name: round(float(np.percentile(times, at)), 1)
                    for name, at in (("least", 0), ("median", 50), ("95 %", 95))
                }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("layout")
    one.add_argument("features")
    one.add_argument("--rows", type=int, default=5000)
    one.add_argument("--method", choices=_PACKAGES, default="opentsne")
    one.add_argument("--threads", type=int, default=2)
    one.set_defaults(run=layout)
    other = commands.add_parser("page")
    other.add_argument("--points", type=int, default=100_000)
    other.set_defaults(run=page)
    for command in (one, other):
        command.add_argument("--out", required=True)
    options = parser.parse_args()
    result = options.run(options) | {"hardware": hardware()}
    print(json.dumps(result, indent=1))
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
