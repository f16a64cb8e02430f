"""Puts a report's tables into docs/results.md, between the lines that name them.

    robustfeat paper all --scale tiny ... --out REPORT
    python benchmarks/results.py REPORT

Copies REPORT's cells, tables and figures to docs/results/, beside what is there of other reports, then replaces what
stands between `<!-- results/NAME.md -->` and `<!-- end -->`. Without REPORT it only does the latter.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"(<!-- results/(\S+)\.md -->\n)((?:(?!<!-- results/).)*?)(<!-- end -->)", re.DOTALL)


def fill(text: str, folder: Path) -> str:
    """The text with each block replaced by the table of that name, and by its figure where there is one.

    Raises:
        ValueError: a block has no end.
        FileNotFoundError: the folder has no such table.
    """

    def block(found: re.Match[str]) -> str:
        opening, name, _, closing = found.groups()
        figure = f"![{name}](results/{name}.svg)\n\n" if (folder / f"{name}.svg").exists() else ""
        return f"{opening}{(folder / f'{name}.md').read_text('utf-8')}\n{figure}{closing}"

    filled, count = _BLOCK.subn(block, text)
    if count != text.count("<!-- results/"):
        raise ValueError("a line <!-- results/NAME.md --> has no <!-- end --> before the next one")
    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="?", type=Path)
    report, folder, page = parser.parse_args().report, DOCS / "results", DOCS / "results.md"
    if report:
        if not (report / "cells").is_dir():
            parser.error(f"{report}: is no report; name the folder that `robustfeat paper --out` wrote")
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        for pattern in ("cells/*.json", "*.md", "*.csv", "*.svg"):
            for file in report.glob(pattern):
                shutil.copy(file, folder / file.relative_to(report))
    page.write_text(fill(page.read_text("utf-8"), folder), "utf-8")


if __name__ == "__main__":
    main()
