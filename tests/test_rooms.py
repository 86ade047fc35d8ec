"""The rooms of docs/architecture.md: imports go downwards, files and functions stay small, and the ways it tells exist."""

import ast
import re
from pathlib import Path

import pytest

from .conftest import REPOSITORY

PACKAGE = REPOSITORY / "cersa_diffusion"
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
FLOORS = {room.replace("/", "."): int(floor) for floor, room in re.findall(r"^\| (\d+) \| `([\w/]+)` \|", PAGE, re.MULTILINE)}
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """The room that a module is in: the longest of the rooms that its name begins with."""
    return max((room for room in FLOORS if f"{module}.".startswith(f"{room}.")), key=len)


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, at any depth, but not those for type checkers only."""
    tree = ast.parse(path.read_text())
    conditions = [node for node in ast.walk(tree) if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"]
    ignored = {child for node in conditions for child in ast.walk(node)}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in ignored and (node.module or "").startswith("cersa_diffusion"):
            names |= {f"{node.module}.{alias.name}".removeprefix("cersa_diffusion.") for alias in node.names}
    return {name if name in FILES else name.rpartition(".")[0] for name in names} - {""}


IMPORTS = {module: imports(path) for module, path in FILES.items() if module != "__init__"}


def test_every_file_has_a_room_and_every_room_has_files():
    assert {room_of(module) for module in IMPORTS} == set(FLOORS)


def test_imports_go_downwards():
    upwards = {
        f"{module} (floor {FLOORS[room_of(module)]}) imports {imported} (floor {FLOORS[room_of(imported)]})"
        for module, targets in IMPORTS.items()
        for imported in targets
        if room_of(module) != room_of(imported) and FLOORS[room_of(module)] <= FLOORS[room_of(imported)]
    }
    assert not upwards, "\n".join(sorted(upwards))


def test_no_circle_between_files():
    known = {module: {name for name in targets if name in IMPORTS} for module, targets in IMPORTS.items()}
    while free := [module for module, targets in known.items() if not targets]:
        known = {module: targets - set(free) for module, targets in known.items() if module not in free}
    assert not known, f"in a circle or above one: {sorted(known)}"


def test_files_and_functions_stay_small():
    long_files = {module: lines for module, path in FILES.items() if (lines := len(path.read_text().splitlines())) > 400}
    functions = [
        (module, node.name, node.end_lineno - node.lineno + 1)
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert not long_files and not [entry for entry in functions if entry[2] > 60]


@pytest.mark.parametrize(("pattern", "rooms"), [('"unet"', {"families"}), (r"nn\.Linear", {"layers"})])
def test_what_only_one_room_knows(pattern, rooms):
    """The name of a denoiser, and the class of a dense layer; docstrings may speak of them."""
    found = set()
    for module, path in FILES.items():
        tree = ast.parse(path.read_text())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docstrings = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)]
        spoken = {line for node in docstrings for line in range(node.lineno, node.end_lineno + 1)}
        code = [line for number, line in enumerate(path.read_text().splitlines(), 1) if number not in spoken]
        if any(re.search(pattern, line) and not line.lstrip().startswith("#") for line in code):
            found.add(room_of(module))
    assert found == rooms


@pytest.mark.parametrize(("way", "most"), [("The way of alpha", 7), ("The way of an adapter", 6)])
def test_the_ways_are_as_short_as_told_and_exist(way, most):
    section = PAGE.split(f"## {way}\n")[1].split("\n## ")[0]
    steps = re.findall(r"^\| \d+ \| `([\w/.]+)` \| `([\w.]+)`", section, re.MULTILINE)
    assert 0 < len(steps) <= most and len({path for path, _ in steps}) == len(steps)
    for path, name in steps:
        tree = ast.parse((REPOSITORY / path).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        fields = {
            node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        assert set(name.split(".")) <= defined | fields, f"{path} has no {name}"
