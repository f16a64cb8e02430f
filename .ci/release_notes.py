"""Prints what CHANGELOG.md says about a version.

    python .ci/release_notes.py 0.2.0

The exit code is 1 if the package has another version, or if CHANGELOG.md has no section with a date for it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(name: str) -> None:
    """Prints the section, or ends with the reason why there is none."""
    source = (ROOT / "robustfeat" / "__init__.py").read_text("utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if version is None or version[1] != name:
        sys.exit(f"robustfeat/__init__.py: __version__ must be {name}; got {version and version[1]}")
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    heading = rf"^## {re.escape(name)} - \d{{4}}-\d\d-\d\d\n"
    section = re.search(rf"{heading}(.*?)(?=^## |\Z)", changes, re.MULTILINE | re.DOTALL)
    if section is None:
        sys.exit(f"CHANGELOG.md: expected a heading `## {name} - YYYY-MM-DD`; rename `## Unreleased`")
    print(section[1].strip())


if __name__ == "__main__":
    main(sys.argv[1])
