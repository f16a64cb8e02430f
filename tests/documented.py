"""The commands and programs that README and docs/ show, block by block."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

__all__ = ["Block", "commands_of", "find_blocks", "find_commands", "pages"]

_FENCED = re.compile(r"^ *(?:<!-- (.+?) -->\n *)?```(\w+)\n((?:.*\n)*?) *```$", re.MULTILINE)
_INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n)+")
_COMMAND = re.compile(r"^    (?:\$ )?(?:robustfeat|torchrun|python|pip|curl|docker|wandb) ", re.MULTILINE)
LANGUAGES = ("bash", "python", "javascript")


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        page: its name below docs/, without the suffix; "README".
        language: one of `LANGUAGES`.
        marker: the comment above it, such as `<!-- tested -->`.
        text: its lines, without indentation.
    """

    page: str
    language: str
    marker: str
    text: str


def pages() -> dict[str, Path]:
    """The pages by name."""
    docs = ROOT / "docs"
    found = [*sorted(docs.glob("*.md")), *sorted(docs.glob("how-to/*.md"))]
    return {"README": ROOT / "README.md"} | {str(page.relative_to(docs).with_suffix("")): page for page in found}


def find_blocks() -> list[Block]:
    """All blocks that a reader may run: fenced programs, and indented lines of a shell."""
    found = []
    for name, page in pages().items():
        text = page.read_text("utf-8")
        for marker, language, block in _FENCED.findall(text):
            if language in LANGUAGES:
                found.append(Block(name, language, marker, block))
        for block in _INDENTED.findall(_FENCED.sub("", text)):
            if _COMMAND.search(block):
                found.append(Block(name, "bash", "", re.sub(r"^    ", "", block, flags=re.MULTILINE)))
    return found


def find_commands() -> list[tuple[str, list[str]]]:
    """Each `robustfeat ...` of a block of a shell or of the text: the page, and the arguments."""
    found = [
        (block.page, arguments)
        for block in find_blocks()
        if block.language == "bash"
        for arguments in commands_of(block.text)
    ]
    for name, page in pages().items():
        text = _FENCED.sub("", page.read_text("utf-8"))
        for code in re.findall(r"`(robustfeat [^`]+)`", text):
            for arguments in commands_of(" ".join(code.split())):
                named = arguments[-1:] and arguments[-1].startswith("--")  # `robustfeat train --init` names the option
                found.append((name, [*arguments, "VALUE"] if named else arguments))
    return found


def commands_of(script: str) -> list[list[str]]:
    """The arguments of each `robustfeat` in lines of a shell. Brackets around options are left out."""
    script = re.sub(r"\\\n|\n +(?=\[?--)", " ", script)
    found = []
    for line in script.splitlines():
        words = shlex.split(re.sub(r"[\[\]]", " ", line), comments=True)
        starts = [place for place, word in enumerate(words) if re.fullmatch(r"(?:.*/)?robustfeat", word)]
        for start in starts:
            rest = words[start + 1 :]
            end = next((n for n, word in enumerate(rest) if word in {"&&", "&", "|", ">", ";"}), len(rest))
            if start == 0 or words[start - 1] in {"$", "&&", "-m"} or "=" in words[start - 1]:
                found.append(rest[:end])
    return found
