"""How plain the project's English is: documents, `--help`, docstrings, comments and error messages.

    python benchmarks/prose.py                        every file, and each kind's total
    python benchmarks/prose.py README.md --show       one file, and the sentences to rewrite
    python benchmarks/prose.py --totals --check       totals only; exit 1 above a limit

Columns: sentences, mean words per sentence, % of sentences over 30 words, colons and semicolons per sentence, lines
over 100 characters (documents only), forbidden phrases. The goal is a mean of 14, 4 % and 0.15, and no such phrase.

Headings, code blocks and HTML comments are left out. Tables are a kind of their own: each cell of five words or more
is a text. A list item is at least one sentence. Inline code and a URL are one word each. A colon that introduces a list
or a block does not count, nor does a link's target in a line's length.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from inspect import cleandoc
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
LONG_SENTENCE, LONG_LINE, WORDS_OF_A_CELL = 30, 100, 5  # words, characters, words

PRE_REGISTERED = "docs/protocol.md"  # keeps the words that were written before the runs

PHRASES = (
    r"(that|those) of",
    r"what (is|are|was)",
    r"one's own",
    r"alone",
    r"likewise",
    r"mend(s|ed|ing)?",
    r"(goes|go|went) on",
    r"(a|an|one|two|each) (?!of|in|at|on|costs)\w+ an? "
    r"(call|class|command|file|head|image|input|key|line|machine|process|request|row|step)",
)


@dataclass(frozen=True)
class Limits:
    """What a kind of text may reach: a ratchet, to be lowered as the texts get better."""

    mean_words: float
    long_percent: float
    marks: float
    long_lines: int
    phrases: int


LIMITS = {
    "documents": Limits(12.4, 0.5, 0.08, 12, 1),
    "tables": Limits(10.2, 0.6, 0.28, 0, 2),
    "changelog": Limits(11.5, 0.5, 0.05, 0, 1),
    "help": Limits(8.3, 0.6, 0.3, 0, 4),
    "docstrings": Limits(10.0, 0.7, 0.21, 0, 70),
    "comments": Limits(9.7, 0.3, 0.15, 0, 14),
    "messages": Limits(7.5, 0.3, 0.29, 0, 15),
}

_PHRASES = re.compile(rf"\b({'|'.join(PHRASES)})\b", re.IGNORECASE)
_ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|cf|vs|al|Eq|Eqs|Fig|Sec|No|approx)\.(?=\s)")
_ITEM = re.compile(r"\s*([-*+]|\d+\.) +")
_SECTION = re.compile(r"[A-Z][a-z]+:$")
_ENTRY = re.compile(r"^[\w*`.,()\[\]/ -]{1,40}: ")
_DIRECTIVE = re.compile(r"#(!|:| ?(noqa|type:|fmt:|ruff:|pragma))")


class Prose:
    """The prose of one file and kind."""

    def __init__(self, kind: str, name: str, passages: list[str], long_lines: int = 0) -> None:
        self.kind, self.name, self.long_lines = kind, name, long_lines
        self.sentences = [sentence for passage in passages for sentence in sentences(passage)]
        self.marks = sum(len(re.findall(r"[:;](?=\s+\S)", sentence)) for sentence in self.sentences)
        self.lengths = [words(sentence) for sentence in self.sentences]
        self.phrases = [found[0] for text in self.sentences for found in _PHRASES.finditer(text)]

    def __add__(self, other: Prose) -> Prose:
        total = Prose(self.kind, "", [], self.long_lines + other.long_lines)
        total.sentences = self.sentences + other.sentences
        total.marks = self.marks + other.marks
        total.lengths = self.lengths + other.lengths
        total.phrases = self.phrases + other.phrases
        return total

    @property
    def figures(self) -> Limits:
        """Comparable with the kind's limits, field by field."""
        count = max(1, len(self.sentences))
        return Limits(
            sum(self.lengths) / count,
            100 * sum(length > LONG_SENTENCE for length in self.lengths) / count,
            self.marks / count,
            self.long_lines,
            len(self.phrases),
        )

    def above(self) -> list[str]:
        """The figures above the kind's limits, each as a line."""
        return [
            f"{self.kind}: {field.name} must be at most {limit}; got {figure:.2f}"
            for field, figure, limit in zip(
                fields(Limits), astuple(self.figures), astuple(LIMITS[self.kind]), strict=True
            )
            if figure > limit
        ]

    def row(self) -> str:
        mean, long, marks, lines, phrases = astuple(self.figures)
        name = self.name or "all"
        return f"{self.kind:11}{name:58}{len(self.sentences):6}{mean:7.1f}{long:6.1f}{marks:7.2f}{lines:6}{phrases:6}"


def words(sentence: str) -> int:
    return sum(any(map(str.isalnum, word)) for word in sentence.split())


def sentences(passage: str) -> list[str]:
    """The sentences of a paragraph, a list item or a message."""
    text = _ABBREVIATIONS.sub(lambda found: found[1], " ".join(passage.split()))
    found = re.split(r"(?<=[.!?])[\"')]*\s+|(?<=[.!?][\"')])\s+", text)
    return [sentence for sentence in found if words(sentence)]


def plain(text: str) -> str:
    """Markdown's inline marks removed; code and URLs as one word."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "CODE", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"https?://[^\s)]+", "URL", text).replace("**", "")


def without_blocks(text: str) -> Iterator[str]:
    """The lines of a document outside of code blocks, tables, headings and HTML comments; empty lines for those."""
    text = re.sub(r"<!--.*?-->|^( *)(```|~~~).*?^\1\2", "", text, flags=re.DOTALL | re.MULTILINE)
    in_list = in_block = False
    before = ""
    for line in text.splitlines():
        indented = line.startswith("    ")
        in_block = indented and not in_list and (in_block or not before.strip())
        if _ITEM.match(line) and not in_block:
            in_list = True
        elif line.strip() and not line.startswith(" "):
            in_list = in_list and bool(before.strip())
        before = line
        yield "" if in_block or re.match(r"\s*[|#<]", line) else line


def document_passages(text: str) -> list[str]:
    """Paragraphs and list items of Markdown, without their marks."""
    passages = [""]
    for line in without_blocks(text):
        item = _ITEM.match(line)
        if item or not line.strip():
            passages.append("")
        passages[-1] += (line[item.end() :] if item else line.strip().removeprefix("> ")) + "\n"
    return [passage for passage in map(plain, passages) if passage.strip()]


def cells(text: str) -> list[str]:
    """The cells of a document's tables that are more than a name or a number."""
    rows = (line for line in text.splitlines() if re.match(r"\s*\|", line))
    found = [cell for row in rows for cell in plain(row.replace(r"\|", "/")).split("|")]
    return [cell for cell in found if words(cell) >= WORDS_OF_A_CELL]


def long_lines(text: str) -> int:
    lines = (re.sub(r"\]\([^)]*\)|https?://[^\s)]+", "", line) for line in without_blocks(text))
    return sum(len(line) > LONG_LINE for line in lines)


def docstring_passages(text: str) -> list[str]:
    """Paragraphs, and the entries of sections such as Args without the names that they describe."""
    lines, in_section = [], False
    for line in re.sub(r"^ *>>>.*?(\n\n|\Z)", "\n", cleandoc(text), flags=re.DOTALL | re.MULTILINE).splitlines():
        if _SECTION.match(line):
            in_section = True
            lines.append("")
        elif in_section and line.startswith(" "):
            entry = not line.startswith("     ")
            lines.append(("- " if entry else "  ") + (_ENTRY.sub("", line.strip()) if entry else line.strip()))
        else:
            in_section = in_section and not line.strip()
            lines.append(_ENTRY.sub("", line) if re.match(r"[A-Z][a-z]+: ", line) else line)
    return document_passages("\n".join(lines))


def comments(source: str) -> Iterator[str]:
    """Each comment; those on lines of their own that follow each other are one."""
    block: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or _DIRECTIVE.match(token.string):
            continue
        line, column = token.start
        alone = not token.line[:column].strip()
        if block and not (alone and line == last + 1):
            yield "\n".join(block)
            block = []
        block.append(token.string.lstrip("#").removeprefix(" "))
        last = line if alone else -1
    if block:
        yield "\n".join(block)


def strings(node: ast.AST) -> Iterator[str]:
    """Texts below a node, but not the names and values that an error is about; VALUE stands for a value in a text."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif not (isinstance(node, ast.keyword) and node.arg in ("argument", "value")):
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def messages(tree: ast.Module) -> list[str]:
    """What `raise` statements say, and what other errors propose as a fix; without the subject before the colon."""
    raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    within = {id(node) for statement in raised for node in ast.walk(statement)}
    fixes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "fix" and id(node) not in within
    ]
    texts = (text for node in (*raised, *fixes) for text in strings(node))
    return [plain(re.sub(r"^\S+: ", "", text)) for text in texts if " " in text.strip()]


def help_passages(command: click.Command) -> list[str]:
    """A command's description and its options' help; paragraphs that click leaves as they are count as blocks."""
    paragraphs = [*re.split(r"\n\s*\n", cleandoc(command.help or "")), command.epilog or ""]
    options = [param.help or "" for param in command.params if isinstance(param, click.Option)]
    return [plain(text) for text in (*paragraphs, *options) if text.strip() and not text.startswith("\b")]


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None:
                yield from commands(found, f"{name} {child}")


def measure() -> Iterator[Prose]:
    """Each file's prose, and each command's."""
    for file in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/how-to/*.md"))):
        text = file.read_text("utf-8")
        if file == ROOT / PRE_REGISTERED:
            continue
        kind, name = "changelog" if file.name == "CHANGELOG.md" else "documents", file.relative_to(ROOT).as_posix()
        yield Prose(kind, name, document_passages(text), long_lines(text))
        yield Prose("tables", name, cells(text))
    sys.path.insert(0, str(ROOT))
    for name, command in commands(importlib.import_module("robustfeat.cli").cli, "robustfeat"):
        yield Prose("help", name, help_passages(command))
    for file in sorted(ROOT.glob("robustfeat/**/*.py")):
        source, name = file.read_text("utf-8"), file.relative_to(ROOT).as_posix()
        tree = ast.parse(source)
        documented = [
            node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ]
        yield Prose("docstrings", name, [part for text in documented for part in docstring_passages(text)])
        yield Prose("comments", name, [part for text in comments(source) for part in document_passages(text)])
        yield Prose("messages", name, messages(tree))


def totals(proses: list[Prose]) -> list[Prose]:
    """The sum of each kind."""
    found: dict[str, Prose] = {}
    for prose in proses:
        found[prose.kind] = found.get(prose.kind, Prose(prose.kind, "", [])) + prose
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="files or commands; all by default")
    parser.add_argument("--show", action="store_true", help="print long sentences and forbidden phrases")
    parser.add_argument("--totals", action="store_true", help="print the totals only")
    parser.add_argument("--check", action="store_true", help="exit 1 when a kind's total is above its limits")
    options = parser.parse_args()
    proses = [prose for prose in measure() if not options.names or prose.name in options.names]
    print(f"{'kind':11}{'name':58}{'sent.':>6}{'words':>7}{'>30 %':>6}{'marks':>7}{'wide':>6}{'phr.':>6}")
    for prose in proses if not options.totals else []:
        if prose.sentences:
            print(prose.row())
        for sentence, length in zip(prose.sentences, prose.lengths, strict=True) if options.show else ():
            found = [match[0] for match in _PHRASES.finditer(sentence)]
            if length > LONG_SENTENCE or found:
                print(f"    {length} words{''.join(f', {text!r}' for text in found)}: {sentence}")
    sums = totals(proses)
    print(*(prose.row() for prose in sums), sep="\n")
    if options.check:
        above = [line for prose in sums for line in prose.above()]
        print(*above, sep="\n", file=sys.stderr)
        sys.exit(bool(above))


if __name__ == "__main__":
    main()
