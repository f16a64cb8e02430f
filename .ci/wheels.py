"""Installs the built wheel in an empty environment of each Python from 3.11 to 3.14, and runs the smoke test there.

    python3 .ci/wheels.py                     every Python that is found on this machine
    python3 .ci/wheels.py 3.12 3.13           these, which must be there
    python3 .ci/wheels.py --others            every Python that is found but the one that runs this
    python3 .ci/wheels.py --wheel dist/X.whl  a wheel that exists; otherwise one is built from the source tree

It looks for `python3.X` on the search path and below ~/.pyenv/versions.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def main() -> None:
    """Reports each Python in one line; the exit code is 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="3.X", help="versions of Python that must be found")
    parser.add_argument("--wheel", type=Path, help="the wheel to install; by default one is built")
    parser.add_argument("--others", action="store_true", help="leave out the version of the Python that runs this")
    options = parser.parse_args()
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel.resolve() if options.wheel else build(Path(folder))
        for name in options.versions or [name for name in VERSIONS if not (options.others and name == own)]:
            python = find(name)
            if python is None:
                print(f"Python {name}: not found", flush=True)
                failed += [name] if options.versions else []
            elif not check(python, wheel, Path(folder) / name):
                failed.append(name)
    if failed:
        sys.exit(f"the wheel fails on Python {', '.join(failed)}")


def build(folder: Path) -> Path:
    """The wheel of the source tree."""
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def find(name: str) -> str | None:
    """A Python of this version that can make environments, or None."""
    for python in candidates(name):
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        if answer.stdout.strip() == name:
            return str(python)
    return None


def candidates(name: str) -> Iterator[str | Path]:
    """Programs that may be this Python. pyenv's shims answer only for versions that are switched on."""
    if sys.version_info[:2] == tuple(map(int, name.split("."))):
        yield sys.executable
    if found := shutil.which(f"python{name}"):
        yield found
    yield from sorted(Path.home().glob(f".pyenv/versions/{name}.*/bin/python{name}"))


def check(python: str, wheel: Path, folder: Path) -> bool:
    """Whether the wheel passes the smoke test in a new environment, which is removed afterwards."""
    began = time.monotonic()
    inside = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    steps: list[list[str | Path]] = [
        [python, "-m", "venv", folder],
        [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}[cpu]"],
        [inside, ROOT / ".ci" / "smoke.py"],
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    passed = all(subprocess.run(step, check=False, env=environment).returncode == 0 for step in steps)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{python}: {'passed' if passed else 'failed'} in {time.monotonic() - began:.0f} s", flush=True)
    return passed


if __name__ == "__main__":
    main()
