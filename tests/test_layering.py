"""The design's layers hold: cli -> training -> serving -> hub, and torch stays out of the lower two."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "robustfeat"
MAY_IMPORT = {
    "hub": {"errors", "files", "progress"},
    "serving": {"errors", "files", "progress", "hub"},
    "training": {"errors", "files", "progress", "hub", "serving"},
    "cli": {"errors", "files", "progress", "hub", "serving", "training"},
}
ENGINES = {"torch", "torchvision", "onnx", "onnxruntime", "openvino"}


def imported_modules(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_layer_imports_only_what_lies_below(layer: str) -> None:
    for file in (PACKAGE / layer).rglob("*.py"):
        for name in imported_modules(file):
            head, _, rest = name.partition(".")
            if head == "robustfeat" and rest and not rest.startswith("__"):
                part = rest.partition(".")[0]
                assert part == layer or part in MAY_IMPORT[layer], f"{file} imports {name}"
            if layer == "hub":
                assert head not in ENGINES, f"{file} imports {name}"
            if layer == "serving":
                assert head not in {"torch", "torchvision"}, f"{file} imports {name}"


def modules(layer: str) -> list[str]:
    return [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted((PACKAGE / layer).rglob("*.py"))
    ]


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_torch_stays_unloaded_when_hub_and_serving_are_imported() -> None:
    names = ["robustfeat", *modules("hub"), *modules("serving")]
    assert len(names) > 8
    assert not {"torch", "torchvision"} & loaded_after("import " + ", ".join(names))


def test_help_loads_no_heavy_module() -> None:
    loaded = loaded_after("from robustfeat.cli import cli; cli.main(['--help'], standalone_mode=False)")
    assert not {"torch", "onnxruntime", "sklearn", "numpy", "PIL"} & loaded
