"""The OpenAPI document says what the server does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.http.conftest import Server


@pytest.mark.parametrize("bodies", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_schemathesis_finds_no_difference(server: Server, tmp_path: Path, bodies: int) -> None:
    # It cannot know what an image is: that good bodies are accepted is for other tests.
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.address}/openapi.json"]
    command += [
        "--checks",
        "all",
        "--exclude-checks",
        "positive_data_acceptance",
        "--max-examples",
        str(bodies),
        "--seed",
        "1",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stdout[-5000:]
    assert "Unresolvable" not in result.stdout
    assert "18 selected / 18 total" in result.stdout


def test_the_document_names_what_is_served(server: Server) -> None:
    document = server.get("/openapi.json").json
    operation = document["paths"]["/predict/{head}"]["post"]
    assert operation["parameters"][0]["schema"]["enum"] == ["clothes"]
    assert {"200", "400", "401", "404", "408", "413", "415", "422", "429", "503"} <= set(operation["responses"])
    assert "swagger" in server.get("/docs").body.decode().lower()
