"""The design's layers hold: cli -> training -> serving -> hub, and torch stays out of the lower two.

Within serving/, arrows point the same way, and no modules of the package import each other in a circle.
"""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "robustfeat"
MAY_IMPORT = {
    "counts": set(),
    "errors": set(),
    "files": {"errors"},
    "palette": set(),
    "progress": set(),
    "system": set(),
    "hub": {"counts", "errors", "files", "progress"},
    "serving": {"counts", "errors", "files", "palette", "progress", "system", "hub"},
    "trial": {"errors", "system", "serving"},
    "doctor": {"counts", "errors", "files", "progress", "system", "hub", "serving", "trial"},
    "training": {"counts", "errors", "files", "palette", "progress", "system", "hub", "serving"},
    "cli": {"counts", "errors", "files", "progress", "system", "hub", "serving", "doctor", "training"},
}
SERVING = {
    "engines": set(),
    "": {"engines"},  # the modules of serving/ itself: extractor, identity, verify, sklearn, ...
    "inputs": {""},
    "decoding": {"", "inputs"},
    "bulk": {"", "engines", "inputs", "decoding"},
    "heads": {"", "inputs", "decoding", "bulk"},
    "collections": {"", "inputs", "bulk", "heads"},
    "maps": {"", "inputs", "decoding", "heads", "collections"},
    "online": {"", "inputs", "decoding", "heads", "collections"},
    "http": {"", "inputs", "heads", "collections", "online"},
    "torchserve": {"", "engines", "inputs", "heads", "online"},
}
HEADS = {
    "": set(),  # features, heads, typicality, predictions
    "labels": {""},
    "solver": {""},
    "reports": {""},
    "fitting": {"", "labels", "solver", "reports"},
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
    for file in [PACKAGE / f"{layer}.py"] if (PACKAGE / f"{layer}.py").exists() else (PACKAGE / layer).rglob("*.py"):
        for name in imported_modules(file):
            head, _, rest = name.partition(".")
            if head == "robustfeat" and rest and not rest.startswith("__"):
                part = rest.partition(".")[0]
                assert part == layer or part in MAY_IMPORT[layer], f"{file} imports {name}"
            if layer == "hub":
                assert head not in ENGINES, f"{file} imports {name}"
            if layer == "serving":
                assert head not in {"torch", "torchvision"}, f"{file} imports {name}"


OLD_NAME = "robustfeat.serving.embedding"
"""It only points to where its function is now."""


PARTED = {"serving": SERVING, "serving/heads": HEADS}


def part_of(folder: str, module: str) -> str | None:
    """The folder within this folder that a module lies in, "" for the folder itself; None for other modules."""
    place = "robustfeat." + folder.replace("/", ".") + "."
    if not module.startswith(place):
        return None
    part = module.removeprefix(place).partition(".")[0]
    return part if (PACKAGE / folder / part).is_dir() else ""


@pytest.mark.parametrize("folder", PARTED)
def test_every_part_has_a_place_in_the_order(folder: str) -> None:
    parts = {file.parent.name for file in (PACKAGE / folder).glob("*/__init__.py")}
    assert parts == set(PARTED[folder]) - {""}


@pytest.mark.parametrize(("folder", "part"), [(folder, part) for folder in PARTED for part in PARTED[folder]])
def test_a_part_imports_only_what_the_order_allows(folder: str, part: str) -> None:
    allowed = {None, part, *PARTED[folder][part]}
    for module, imports in import_graph().items():
        if module != OLD_NAME and part_of(folder, module) == part:
            found = {name for name in imports if part_of(folder, name) not in allowed}
            assert not found, f"{module} imports {', '.join(sorted(found))}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = import_graph()
    assert len(graph) > 100
    assert circle(graph) is None


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, None),
        ({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}, ["b", "c", "d", "b"]),
        ({"a": set(), "b": {"b"}}, ["b", "b"]),
    ],
)
def test_a_circle_is_reported_module_by_module(graph: dict[str, set[str]], found: list[str] | None) -> None:
    assert circle(graph) == found


def test_imports_in_functions_count_and_those_for_types_do_not(tmp_path: Path) -> None:
    code = """
from typing import TYPE_CHECKING
import one
if TYPE_CHECKING:
    import two
else:
    import three
def function():
    from four import name
"""
    (tmp_path / "module.py").write_text(code)
    assert loaded_names(tmp_path / "module.py") == {"typing.TYPE_CHECKING", "one", "three", "four.name"}


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """The modules of the package, each with those that it imports by name, also within functions."""
    files = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted(PACKAGE.rglob("*.py"))
    }
    graph = {}
    for module, file in files.items():
        names = {name if name in files else name.rpartition(".")[0] for name in loaded_names(file)}
        graph[module] = (names & set(files)) - {module}
    return graph


def loaded_names(file: Path) -> set[str]:
    """What a file imports when it runs: modules, and MODULE.NAME for each `from MODULE import NAME`."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(file.read_text("utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return names


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules of which each imports the next, and the last is the first; None where there is no circle."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for name in sorted(graph[module]):
            if (found := search(name, [*path, module])) is not None:
                return found
        done.add(module)
        return None

    return next((found for module in graph if (found := search(module, [])) is not None), None)


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


def test_a_decoder_loads_nothing_that_lists_inputs() -> None:
    loaded = loaded_after("import robustfeat.serving.decoding.worker")
    assert not loaded & {f"robustfeat.serving.inputs.{name}" for name in ("listing", "parquet", "tar")}


def test_torch_stays_unloaded_when_hub_and_serving_are_imported() -> None:
    names = ["robustfeat", *modules("hub"), *modules("serving")]
    assert len(names) > 8
    assert not {"torch", "torchvision"} & loaded_after("import " + ", ".join(names))


WITHOUT_TORCH = (
    "arguments assembly calibration classifier compact graph_adapting graph_batch graph_editing graph_head "
    "graph_pooling graph_reading onnx_import "
    "provenance repository stamp int8.graph int8.layers int8.observation int8.quantise int8.rounding"
)


def test_onnx_files_are_imported_without_torch() -> None:
    names = [f"robustfeat.training.export.{name}" for name in WITHOUT_TORCH.split()]
    assert not {"torch", "torchvision", "timm", "transformers"} & loaded_after("import " + ", ".join(names))


def test_help_loads_no_heavy_module() -> None:
    loaded = loaded_after("from robustfeat.cli import cli; cli.main(['--help'], standalone_mode=False)")
    assert not {"torch", "onnxruntime", "sklearn", "numpy", "PIL"} & loaded


MISTAKES = [
    ["train", "nosuch", "--out", "new"],
    ["train", "examples/images", "--out", "new", "--method", "nosuch"],
    ["train", "examples/images", "--out", "new", "--method", "no.such:Class"],
    ["train", "examples/images", "--out", "new", "--config", "nosuch"],
    ["train", "examples/images", "--out", "new", "--concepts", "nosuch.csv"],
    ["train", "examples/images", "--out", "new", "--teacher", "nosuch"],
    ["train", "examples/images", "--out", "new", "--no-labels"],
    ["train", "examples/images", "--out", "new", "--concepts", "clusters:3"],
    ["train", "examples/images", "--out", "new", "--batch-size", "0"],
    ["train", "examples/images", "--out", "new", "--cache", "ram"],
    ["train", "examples/images", "--out", "new", "--resume"],
    ["evaluate", "nosuch", "--task", "clothes=examples/images"],
    ["evaluate", "builtin", "--task", "clothes=nosuch"],
    ["compare", "nosuch"],
    ["export", "nosuch", "--out", "new"],
    ["import", "nosuch", "--out", "new"],
    ["import", "timm:resnet18", "--out", "examples"],
    ["import", "timm:resnet18", "--out", "new", "--weights", "nosuch.pt"],
    ["import", "timm:resnet18", "--out", "new", "--mean", "0.5"],
    ["import", "nosuch.onnx", "--out", "new"],
    ["import", "hf:nosuch", "--out", "new"],
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
