"""What HTTP and TorchServe share imports neither of them, and decoding imports no server."""

import pytest

from tests.test_layering import PACKAGE, imported_modules

SERVING = PACKAGE / "serving"
MAY_IMPORT: dict[str, set[str]] = {
    "inputs": set(),
    "decoding": {"inputs"},
    "online": {"decoding", "inputs"},
    "engines": set(),
    "collections": {"heads", "inputs"},
    "http": {"online", "heads", "collections", "engines", "inputs"},
    "torchserve": {"online", "engines"},
}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_part_imports_only_what_lies_below(part: str) -> None:
    folders = {folder.name for folder in SERVING.iterdir() if (folder / "__init__.py").is_file()}
    for file in (SERVING / part).rglob("*.py"):
        for name in imported_modules(file):
            head, _, rest = name.partition("robustfeat.serving.")
            other = rest.partition(".")[0]
            if not head and other in folders - {part}:
                assert other in MAY_IMPORT[part], f"{file} imports {name}"
