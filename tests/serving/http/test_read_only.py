"""The Hub's cache on a read-only file system, as containers have it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustfeat import Head
from tests.conftest import ROOT, Run, files_of, hub_environment
from tests.hub_server import FakeHub

MOUNT = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


def read_only(folder: Path, environment: dict[str, str], *command: object) -> subprocess.CompletedProcess[str]:
    """Runs a command that sees a folder read-only, even as root: in a mount namespace of its own."""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    unshare = ["unshare", "--mount", *as_root, "sh", "-c", MOUNT, str(folder)]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system grants no mount namespaces")
    return subprocess.run(
        [*unshare, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )


LOAD = """
import sys
from robustfeat import Head
print(Head.from_pretrained("org/clothes", revision=sys.argv[1]).sha256)
"""


@pytest.mark.slow
def test_a_filled_cache_serves_read_only_and_an_empty_one_is_one_line(
    hub: FakeHub, robustfeat: Run, clothes: Path, tmp_path: Path
) -> None:
    repo = hub.add("org/clothes", files_of(clothes))
    home = tmp_path / "home"
    home.mkdir()
    environment = hub_environment(hub, home)
    serve = [sys.executable, "-m", "robustfeat", "serve", "--port", 0, "--head", "org/clothes"]
    refused = read_only(home, environment, *serve)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert str(home / "hub") in refused.stderr
    assert "Read-only file system; " in refused.stderr
    assert "HF_HUB_CACHE" in refused.stderr
    # Filled by an init container, the same folder needs neither a network nor a place to write.
    assert robustfeat("pull", "org/clothes", env=environment).returncode == 0
    for revision in ("main", repo.branches["main"]):
        offline = environment | {"HF_HUB_OFFLINE": "1"}
        loaded = read_only(home, offline, sys.executable, "-c", LOAD, revision)
        assert loaded.stdout.strip() == Head.load(clothes).sha256, loaded.stderr
