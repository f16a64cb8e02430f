"""The documentation site: it builds without a warning, holds every name and option, and is whole on a phone."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from playwright.sync_api import Browser

import robustfeat
import speed_chart
from robustfeat.cli import cli
from tests.browser import visit
from tests.conftest import ROOT, Share

WIDTHS = (390, 1280)  # of a phone and of a window, in CSS pixels


@pytest.fixture(scope="module")
def site(share: Share) -> Path:
    """The site. A warning, such as a link that leads nowhere, fails the build."""

    def build(out: Path) -> None:
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", f"{out}.trees", "docs", str(out)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    return share("site", build)


def options(command: click.Command) -> set[str]:
    """The long names of all options of a command and of the commands below it."""
    found = {name for option in command.params for name in option.opts if name.startswith("--")}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found |= options(below)
    return found - {"--version"}


def test_the_reference_has_every_name_and_option(site: Path) -> None:
    text = (site / "reference" / "commands.html").read_text("utf-8")
    assert not {name for name in options(cli) if f"{name}" not in text}
    assert "`" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL)  # code is marked as such
    text = (site / "reference" / "api.html").read_text("utf-8")
    names = set(robustfeat.__all__) - {"__version__"}
    assert not {name for name in names if f'id="robustfeat.{name}"' not in text}


def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    loaded = re.compile(r"<(?:script|img|iframe|link(?! rel=\"canonical\"))[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*")
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 35
    for page in pages:
        assert not loaded.findall(page.read_text("utf-8")), page.name
    for file in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", file.read_text("utf-8")), file.name


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_the_window(site: Path, browser: Browser, width: int) -> None:
    pages = sorted(site.rglob("*.html"))
    wide = {}
    with visit(browser, pages[0], allowed=(site.as_uri(),), width=width) as seen:
        for page in pages:
            seen.page.goto(page.as_uri())
            found = seen.page.evaluate("document.scrollingElement.scrollWidth")
            if found > width:
                wide[page.name] = found
    assert not wide


def test_the_comparison_has_the_measured_rates() -> None:
    measured = speed_chart.programs((ROOT / "docs" / "embedding.md").read_text("utf-8"))
    table = (ROOT / "docs" / "comparison.md").read_text("utf-8").partition("| 64 px | 224 px |")[2].partition("\n\n")[0]
    shown = {tuple(map(int, pair)) for pair in re.findall(r" \| (\d+) \| (\d+) \|$", table, re.MULTILINE)}
    assert len(shown) == 6
    assert shown < {program.rates for program in measured}


def test_the_figure_of_hrrl_is_its_scripts() -> None:
    specification = importlib.util.find_spec("hrrl_figure")
    assert specification is not None
    import hrrl_figure

    assert hrrl_figure.FIGURE.read_text("utf-8") == hrrl_figure.figure(), "run `python benchmarks/hrrl_figure.py`"
    weights = hrrl_figure.weights()
    shares = [count / sum(hrrl_figure.COUNTS) for count in hrrl_figure.COUNTS]
    assert sum(weight * share for weight, share in zip(weights, shares, strict=True)) == pytest.approx(1)
    assert max(weights) == weights[-1]
