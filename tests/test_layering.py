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
    command = [sys.executable, "-c", f"import sys\n{statement}\nprint(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_torch_stays_unloaded_when_hub_and_serving_are_imported() -> None:
    names = ["robustfeat", *modules("hub"), *modules("serving")]
    assert len(names) > 8
    assert not {"torch", "torchvision"} & loaded_after("import " + ", ".join(names))


def test_help_loads_no_heavy_module() -> None:
    loaded = loaded_after("from robustfeat.cli import cli; cli.main(['--help'], standalone_mode=False)")
    assert not {"torch", "onnxruntime", "sklearn", "numpy", "PIL"} & loaded


MISTAKES = [
    ["train", "nosuch", "--out", "new"],
    ["train", "examples/images", "--out", "new", "--method", "nosuch"],
    ["train", "examples/images", "--out", "new", "--method", "no.such:Class"],
    ["train", "examples/images", "--out", "new", "--config", "nosuch"],
    ["train", "examples/images", "--out", "new", "--concepts", "nosuch.csv"],
    ["train", "examples/images", "--out", "new", "--batch-size", "0"],
    ["train", "examples/images", "--out", "new", "--cache", "ram"],
    ["train", "examples/images", "--out", "new", "--resume"],
    ["evaluate", "nosuch", "--task", "clothes=examples/images"],
    ["evaluate", "builtin", "--task", "clothes=nosuch"],
    ["export", "nosuch", "--out", "new"],
    ["import", "nosuch", "--out", "new"],
    ["import", "timm:resnet18", "--out", "examples"],
    ["import", "timm:resnet18", "--out", "new", "--weights", "nosuch.pt"],
    ["paper", "table2", "--out", "new", "--target", "nosuch=examples/images"],
    ["paper", "table2", "--out", "new", "--target", "cifar10=nosuch"],
]


def test_cheap_mistakes_are_found_before_anything_heavy_is_loaded() -> None:
    statement = f"""
from robustfeat.cli import cli
from robustfeat.cli.rendering import Failure
for arguments in {MISTAKES!r}:
    try:
        cli.main(arguments, standalone_mode=False)
    except Failure:
        continue
    raise AssertionError(arguments)
"""
    assert not {"torch", "torchvision", "timm", "sklearn", "onnxruntime"} & loaded_after(statement)
