"""The programs in examples/ do what they say, on the photographs beside them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.command_server import CommandServer
from tests.conftest import EXAMPLES, ROOT, Run
from tests.serving.http.conftest import Server


def test_search_finds_the_image_and_the_one_most_like_it(python: Run, tmp_path: Path) -> None:
    code = (ROOT / "examples" / "search.py").read_text("utf-8")
    printed = []
    for folder in (EXAMPLES, tmp_path / "nowhere"):  # the second call reads feats.npy only
        result = python(code, folder, EXAMPLES / "hat" / "hat-1.jpg", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout.splitlines())
    assert printed[0] == printed[1]
    assert printed[0][:2] == ["1.000  hat/hat-1.jpg", "0.574  hat/hat-2.jpg"]
    assert len(printed[0]) == 5


def test_few_labels_ends_with_one_image_left(python: Run) -> None:
    code = (ROOT / "examples" / "few_labels.py").read_text("utf-8")
    result = python(code, EXAMPLES, "hat", "shoes")
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^(\d) labels: (\d+)% of the other (\d) images are right$", result.stdout, re.MULTILINE)
    assert [(int(labels), int(rest)) for labels, _, rest in found] == [(n, 8 - n) for n in range(2, 8)]
    assert int(found[-1][1]) == 100


def test_the_client_waits_for_a_busy_server_and_names_what_is_no_image(
    python: Run, commands: CommandServer, clothes: Path, tmp_path: Path
) -> None:
    shutil.copytree(EXAMPLES / "hat", tmp_path / "hat")
    (tmp_path / "hat" / "notes.txt").write_text("no image")
    code = (ROOT / "examples" / "client.py").read_text("utf-8")
    server = Server("--head", f"clothes={clothes}", "--max-queue", "1", "--max-items", "1", forked_from=commands)
    try:
        result = python(code, f"{server.address}/predict/clothes", tmp_path / "hat")
        refused = server.metric("robustfeat_errors_total") - 1  # notes.txt
    finally:
        assert server.stop() == 0
    assert result.returncode == 0, result.stderr
    assert refused > 0
    *hats, notes = result.stdout.splitlines()
    assert hats == [f"hat-{n}.jpg: hat" for n in range(1, 5)]
    assert notes.startswith("notes.txt: 422: the body is no image")
