"""The house rules that can be read off the sources."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "bkn_core").rglob("*.py"))
SOURCES = [*LIBRARY, *sorted((ROOT / "bkn_cli").rglob("*.py"))]
LONGEST_FILE, LONGEST_FUNCTION, MOST_POSITIONAL = 300, 40, 5

# What each room of the library may import beside itself and `errors`.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "kinds": set(),
    "recipe": {"kinds"},
    "filter": set(),
    "ops": {"filter"},
    "layers": {"ops", "filter"},
    "graph": {"layers", "ops", "filter"},
    "priors": {"graph", "layers", "ops", "filter"},
    "baselines": {"graph", "layers"},
    "convert": {"kinds", "baselines", "priors", "graph", "layers", "filter"},
    "population": {"layers", "filter"},
    "centred_weights": {"graph"},
    "engine": {"kinds", "recipe", "convert", "centred_weights", "population", "priors", "layers", "ops", "filter"},
    "export": {"kinds", "engine", "recipe", "convert", "population", "priors", "layers", "filter"},
    "evaluate": {"kinds", "engine", "export", "recipe"},
    "predict": {"kinds", "engine", "export", "population"},
    "compare": {"kinds", "engine", "recipe"},
}
HEAVY = {"matplotlib", "sklearn", "onnx", "onnxruntime", "onnxscript", "scipy"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    """`filter` for bkn_core/filter/kalman.py; files beside the rooms that share a name's beginning share its room."""
    first = path.relative_to(ROOT / "bkn_core").parts[0].removesuffix(".py")
    return "recipe" if first.startswith("recipe") else first


def imports(path: Path, *, at_import_time: bool = False) -> Iterator[str]:
    """The modules a file imports: everywhere, or only what importing the file brings in."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if at_import_time and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if at_import_time and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_sources_are_found() -> None:
    assert {"bkn_core/filter/kalman.py", "bkn_core/convert.py", "bkn_cli/__init__.py"} <= {name(p) for p in SOURCES}


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_arrows_point_one_way(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    assert here in ARROWS, f"{here} is a new room: say what it may import"
    rooms = set(ARROWS) | {path.stem for path in LIBRARY if path.stem.startswith("recipe")}
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "bkn_core" and len(parts) > 1 and parts[1] in rooms:
            there = "recipe" if parts[1].startswith("recipe") else parts[1]
            assert there in {here, "errors"} | ARROWS[here], f"{name(path)} imports {module}"


def test_arrows_have_no_circle() -> None:
    graphlib.TopologicalSorter(ARROWS).prepare()


def test_files_have_no_circle() -> None:
    """Nor do imports under TYPE_CHECKING or inside functions close one: what a type needs to know stands lower."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in LIBRARY}
    reads = {module: {other for other in imports(path) if other in files} for module, path in files.items()}
    reads["bkn_core.engine.state"].discard("bkn_core.engine.training")  # a type alone
    graphlib.TopologicalSorter(reads).prepare()


def test_every_arrow_is_walked() -> None:
    """What a room may import and does not would only hide the next import that should not be."""
    walked: dict[str, set[str]] = {here: set() for here in ARROWS}
    for path in LIBRARY:
        for module in imports(path):
            if module.startswith("bkn_core.") and room(path) in walked:
                walked[room(path)].add(room(ROOT / f"{module.replace('.', '/')}.py"))
    assert {here: there - walked[here] for here, there in ARROWS.items() if there - walked[here]} == {}


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_library_neither_talks_nor_exits(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports(path)}
    assert not roots & {"typer", "rich", "click", "bkn_cli"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"print", "exit", "quit", "sys.exit", "os._exit", "input"}, (
                f"{name(path)}:{node.lineno}"
            )
        assert not (isinstance(node, ast.Raise) and "SystemExit" in ast.unparse(node)), f"{name(path)}:{node.lineno}"


def test_command_line_imports_public_names_only() -> None:
    for path in sorted((ROOT / "bkn_cli").rglob("*.py")):
        for module in imports(path):
            assert not any(part.startswith("_") for part in module.split(".") if part != "__future__"), name(path)


def test_the_filter_imports_torch_only() -> None:
    roots = {module.split(".")[0] for module in imports(ROOT / "bkn_core/filter/kalman.py")}
    assert roots <= {"__future__", "typing", "torch"}


@pytest.mark.parametrize("path", [path for path in LIBRARY if room(path) in ("recipe", "errors")], ids=name)
def test_recipes_and_errors_import_no_torch(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports(path)}
    assert not roots & {"torch", "torchvision", "numpy"}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_heavy_is_imported_at_import_time(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports(path, at_import_time=True)}
    assert not roots & HEAVY


def test_onnx_runtime_is_imported_by_the_room_that_silences_it_only() -> None:
    rooms = {path.parent for path in SOURCES if any(m.split(".")[0] == "onnxruntime" for m in imports(path))}
    assert rooms == {ROOT / "bkn_core/export"}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_sizes_stay_within_the_walls(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= LONGEST_FUNCTION, f"{node.name} has {lines} lines"


def test_no_signed_number_is_printed_as_minus_nothing() -> None:
    assert [name(path) for path in SOURCES if re.search(r":\+\.\d", path.read_text())] == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_names_and_places_follow_the_house(path: Path) -> None:
    assert path.stem not in {"utils", "helpers", "common"}
    text = path.read_text()
    assert "/work" not in text and "/tmp" not in text and "/opt/" not in text
    for node in ast.walk(ast.parse(text)):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{name(path)}:{node.lineno}"
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "every file says what it is for"
