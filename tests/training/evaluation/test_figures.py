"""Line plots: what stands on the axes, and that names are drawn as they are."""

import re

from robustfeat.palette import SERIES
from robustfeat.training.evaluation.figures import Curve, Panel, draw


def texts(panel: Panel) -> list[str]:
    """What an SVG of it says: matplotlib draws letters as shapes, with a comment that has the text."""
    return re.findall(r"<!-- (.*?) -->", draw([panel], "svg", "figure").decode())


def test_whole_numbers_have_whole_ticks() -> None:
    epochs, steps = Curve("ERM", [(1, 1), (2, 9), (3, 5)]), Curve("EL", [(1.25, 1), (3, 9)])
    for curves, whole in (([epochs], True), ([epochs, steps], False)):
        assert ({"1.5", "1.50"}.isdisjoint(texts(Panel("", "", "", curves)))) == whole


def test_dollars_are_no_formulas() -> None:
    unreadable = r"a$\nothing$"  # is an error as a formula
    assert draw([Panel(unreadable, "epoch", "error", [Curve(unreadable, [(0.5, 1)])])], "png", "figure")


def test_points_alone_are_not_joined() -> None:
    for joined in (True, False):
        panel = Panel("", "s", "h(s)", [Curve("maxima", [(1, 2), (3, 4)], joined=joined)])
        assert ("stroke-width: 1.5" in draw([panel], "svg", "fig2").decode()) == joined  # is the width of lines


def test_figures_of_one_page_share_no_names() -> None:
    panel = Panel("", "epoch", "error", [Curve("ERM", [(1, 2), (3, 4)])])
    named = [set(re.findall(r'id="(\w{10,})"', draw([panel], "svg", name).decode())) for name in ("fig3", "fig4")]
    assert named[0]
    assert not named[0] & named[1]
    assert draw([panel], "svg", "fig3") == draw([panel], "svg", "fig3")


def test_panels_of_the_same_curves_tell_them_once() -> None:
    one, other = Panel("", "", "", [Curve("ERM", [(1, 2)])]), Panel("", "", "", [Curve("EL", [(1, 2)])])
    for panels, told in (([one, one, one], {"ERM": 1, "EL": 0}), ([one, one, other], {"ERM": 1, "EL": 1})):
        text = draw(panels, "svg", "figure").decode()
        assert {label: text.count(f"<!-- {label} -->") for label in told} == told


def test_lines_have_the_palette_and_follow_dark_pages() -> None:
    curves = [Curve(str(number), [(1, number), (2, 9)]) for number in range(len(SERIES))]
    drawn = draw([Panel("", "", "", curves)], "svg", "figure").decode()
    assert re.findall(r"stroke: (#\w{6}); stroke-width: 1.5", drawn)[: len(SERIES)] == list(SERIES)
    assert "@media (prefers-color-scheme: dark) { svg { filter: invert(1)" in drawn
