"""docs/guarantees.md names a test for each promise, and the test is there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "guarantees.md"
ROW = re.compile(r"\| (.+\.) \| `(\S+\.py)::(test_\w+)` \|")


def test_each_promise_has_a_test_that_exists() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|") and "---" not in line]
    promises = [line for line in rows if line != "| promise | test |"]
    assert len(promises) > 50
    for line in promises:
        match = ROW.fullmatch(line)
        assert match, f"not `| promise. | `file::test` |`: {line}"
        _, file, name = match.groups()
        tree = ast.parse((TESTS / file).read_text())
        tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert tests, f"{file} has no test {name}"
        marks = " ".join(map(ast.unparse, tests[0].decorator_list))
        assert not re.search(r"\bskip\b", marks), f"{file}::{name} is skipped everywhere"
    assert len({line.split(" | ")[0] for line in promises}) == len(promises)


def test_security_md_points_at_the_page() -> None:
    assert "docs/guarantees.md" in (TESTS.parent / "SECURITY.md").read_text()
