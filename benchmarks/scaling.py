"""What it takes to embed and to keep many images: processors, network, storage and money, from measured rates.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --images 3e7 --rate 54 --image-kb 400 --processor-hour 0.03

The defaults are the figures of docs/embedding.md and docs/collections.md, and list prices of a large cloud. The tables
are those of docs/scaling.md. The number of replicas for requests is in capacity.py.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

LISTED_PER_REQUEST = 1000
LIST_REQUEST_S = 0.1
"""Of S3, whose answers name up to 1,000 keys; the time is an assumption."""


@dataclass(frozen=True)
class Model:
    """Measured rates and prices.

    Attributes:
        rate: images/s of a processor: `embed` at 224 px with OpenVINO int8 (docs/embedding.md, 286 on two).
        image_kb: of an image file.
        feature_bytes: of a row of 512 features.
        index_bytes: of a line of the index with a path of 40 characters.
        search_bytes: per row, of the index of `similar --approximate` (docs/collections.md).
        processor_hour: dollars.
        million_gets: dollars per million requests to object storage.
        terabyte_month: dollars of object storage.
    """

    rate: float = 143.0
    image_kb: float = 100.0
    feature_bytes: int = 2048
    index_bytes: int = 160
    search_bytes: int = 528
    processor_hour: float = 0.04
    million_gets: float = 0.40
    terabyte_month: float = 23.0

    def embedding(self, images: float, days: float) -> dict[str, str]:
        """A line about embedding so many images in so many days."""
        per_s = images / (86_400 * days)
        hours = images / self.rate / 3600
        return {
            "images": power(images),
            "processor hours": f"{hours:,.1f}" if hours < 100 else f"{hours:,.0f}",
            "processors": number(max(1, per_s / self.rate)),
            "network, Gbit/s": f"{per_s * self.image_kb * 8e-6:.2g}",
            "listing, s": number(images / LISTED_PER_REQUEST * LIST_REQUEST_S),
            "processors, $": number(hours * self.processor_hour),
            "requests, $": number(images / 1e6 * self.million_gets),
        }

    def keeping(self, images: float) -> dict[str, str]:
        """A line about the size of what is written."""
        stored = images * (self.feature_bytes + self.index_bytes)
        return {
            "images": power(images),
            "features": size(images * self.feature_bytes),
            "index": size(images * self.index_bytes),
            "files of 1,048,576 rows": number(max(1, images / 2**20)),
            "index of `similar --approximate`": size(images * self.search_bytes),
            "storage, $ per month": number(stored / 1e12 * self.terabyte_month),
        }


def power(images: float) -> str:
    mantissa, exponent = f"{images:e}".split("e")
    shown = "" if float(mantissa) == 1 else f"{float(mantissa):g} x "
    return f"{shown}10^{int(exponent)}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def size(value: float) -> str:
    for unit in ("MB", "GB", "TB"):
        value /= 1e6 if unit == "MB" else 1e3
        if value < 1000 or unit == "TB":
            break
    return f"{value:.3g} {unit}"


def table(lines: list[dict[str, str]]) -> str:
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |".replace("| --- ", "|---").replace("---|", "---|") for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, nargs="+", default=[1e6, 1e8, 1e10])
    parser.add_argument("--days", type=float, default=1.0, help="in which they are to be embedded")
    for name, default in vars(Model()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = vars(parser.parse_args())
    images, days = options.pop("images"), options.pop("days")
    model = Model(**options)
    print(table([model.embedding(count, days) for count in images]), end="\n\n")
    print(table([model.keeping(count) for count in images]))


if __name__ == "__main__":
    main()
