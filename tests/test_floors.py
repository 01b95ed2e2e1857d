"""Imports go down only (CONTRIBUTING.md, "Floors"). An import inside a function counts."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "engrammar"
FLOORS = {
    0: ("config",),
    1: ("vocabulary", "addressing", "machine", "masks"),
    2: ("checkpoint", "durable", "store"),
    3: ("memory", "table", "fusion", "stored"),
    4: ("rivals", "configuration", "hyper", "block", "modeling", "presets", "budget", "attach"),
    5: ("train", "lab", "check", "edit"),
    6: ("bench", "serve"),
    7: ("__init__",),
    8: (
        "engrammar_cli",
        "engrammar_table_cli",
        "engrammar_lab_cli",
        "engrammar_eval_cli",
        "engrammar_answer",
    ),  # beside the package, see its docstring
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
# Within a floor, these may import those.
SAME_FLOOR = {
    ("checkpoint", "durable"),
    ("store", "checkpoint"),
    ("store", "durable"),
    ("memory", "table"),
    ("stored", "memory"),
    ("stored", "table"),
    ("block", "configuration"),
    ("block", "hyper"),
    ("configuration", "rivals"),
    ("modeling", "block"),
    ("modeling", "configuration"),
    ("modeling", "hyper"),
    ("modeling", "rivals"),
    ("presets", "configuration"),
    ("budget", "configuration"),
    ("budget", "modeling"),
    ("budget", "rivals"),
    ("lab", "train"),
}
FILES = [*sorted(SOURCE.rglob("*.py")), *sorted(SOURCE.parent.glob("*.py"))]


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0] if path.is_relative_to(SOURCE) else path.stem


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            modules = [f"{module}.{alias.name}" for alias in node.names] if module == "engrammar" else [module]
        parts |= {module.split(".")[1] for module in modules if module.startswith("engrammar.")}
    return parts - {part_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE.parent)))
def test_imports_go_down(path):
    own = part_of(path)
    assert own in FLOOR_OF, f"{own} stands on no floor: add it to FLOORS"
    for other in imported_parts(path):
        below = FLOOR_OF[other] < FLOOR_OF[own]
        assert below or (own, other) in SAME_FLOOR, f"{own} (floor {FLOOR_OF[own]}) imports {other}"


def test_retrieval_and_fusion_never_import_each_other():
    retrieval, fusion = ("vocabulary", "addressing", "table", "memory"), ("fusion", "hyper")
    for name in retrieval:
        assert not imported_parts(SOURCE / f"{name}.py") & set(fusion)
    for name in fusion:
        assert not imported_parts(SOURCE / f"{name}.py") & set(retrieval)


def test_the_lowest_floor_imports_no_tensor_library():
    tree = ast.parse((SOURCE / "config.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not modules & {"torch", "numpy", "transformers", "safetensors"}


def test_no_file_is_over_400_lines():
    long = {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long
