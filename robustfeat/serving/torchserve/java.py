"""Finds the Java for TorchServe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from robustfeat.errors import EngineError

__all__ = ["INSTALL", "MIN_VERSION", "Java", "find_java"]

MIN_VERSION = 17
_ANSWER_S = 30
INSTALL = f"install one (Debian: apt-get install openjdk-{MIN_VERSION}-jre-headless), or set JAVA_HOME to it"


@dataclass(frozen=True)
class Java:
    """A working Java.

    Attributes:
        path: path of the program.
        version: the major version, such as 17.
    """

    path: str
    version: int


def find_java() -> Java:
    """Finds Java in JAVA_HOME, or else on the search path.

    Raises:
        EngineError: Java is missing or too old.
    """
    home = os.environ.get("JAVA_HOME")
    path = shutil.which(Path(home, "bin", "java") if home else "java")
    if path is None:
        where = f"JAVA_HOME is {home}, which has none" if home else "none is on the PATH"
        raise EngineError(f"TorchServe needs Java {MIN_VERSION} or newer; {where}", fix=INSTALL)
    try:
        done = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=_ANSWER_S, check=False)
        said = done.stderr + done.stdout
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise EngineError(f"{path}: does not run ({exc})", fix=INSTALL) from exc
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    if found is None:
        answer = " ".join(said.split())[:100]
        raise EngineError(f"{path}: reports no version ({answer})", fix=INSTALL)
    if int(found[1]) < MIN_VERSION:
        raise EngineError(f"{path}: TorchServe needs Java {MIN_VERSION} or newer; this is {found[1]}", fix=INSTALL)
    return Java(path, int(found[1]))
