"""Imports go down only (CONTRIBUTING.md, "Floors"). An import inside a function counts."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
# From the lowest floor up. A part is a module or a folder under src; the longest name that fits a file is its part.
FLOORS = (
    ("engrammar.config", "engrammar.cells", "engrammar.versions"),
    ("engrammar.tables.headers",),
    ("engrammar.tables.checksums",),
    ("engrammar.tables.sealed",),
    ("engrammar.vocabulary", "engrammar.addressing"),
    ("engrammar.tables",),
    ("engrammar.stores",),
    ("engrammar.table", "engrammar.fusion"),
    ("engrammar.memory", "engrammar.reference", "engrammar.off"),
    ("engrammar.stores.serving",),
    ("engrammar.model",),
    ("engrammar.attach", "engrammar.released"),
    ("engrammar.edit",),
    ("engrammar.train",),
    ("engrammar.planning",),
    ("engrammar.serve", "engrammar.titan"),
    ("engrammar",),
    ("engrammar_lab", "engrammar_explore"),
    ("engrammar_cli",),
)
# Inside these folders, from the lowest file up: a file imports only what stands before it.
ROOMS = {
    "engrammar.tables": (
        "headers",
        "checksums",
        "sealed",
        "encodings",
        "shards",
        "memory_json",
        "folder",
        "verify",
        "convert",
        "released.files",
        "released.qwen",
        "released.deepseek",
        "released.convert",
    ),
    "engrammar.stores": (
        "base",
        "shared",
        "aio",
        "paged",
        "ram",
        "disk",
        "cache",
        "to_device",
        "mooncake.process",
        "mooncake.pool",
        "mooncake.store",
        "mooncake.upload",
        "serving",
    ),
    "engrammar.model": ("configuration", "presets", "hyper", "block", "saving", "pretrained", "modeling", "budget"),
    "engrammar.edit": (
        "ranges",
        "exact",
        "names",
        "forms",
        "patch",
        "checking",
        "files",
        "exported",
        "rows",
        "stack",
        "building",
        "overlay",
        "written",
        "lookup",
        "uses",
        "gating",
        "sequences",
        "passes",
        "applying",
        "offering",
        "facts",
        "units",
        "states",
        "phrasings",
        "answers",
        "forgetting",
        "probing",
        "shared",
        "gated",
        "optimizing",
        "asking",
        "vector",
        "solving",
        "hashed",
        "learning",
    ),
    "engrammar_explore": (
        "pieces",
        "watching",
        "traffic",
        "census",
        "looking",
        "trying",
        "session",
        "opening",
        "guarding",
        "export",
        "serving",
    ),
    "engrammar.serve.openai": (
        "asked",
        "text",
        "choosing",
        "sampling",
        "loading",
        "engine",
        "metrics",
        "server",
    ),
    "engrammar.serve.vllm": (
        "settings",
        "patches",
        "state",
        "heads",
        "reading",
        "choosing",
        "patching",
        "backbone",
        "adding",
        "self_test",
        "model",
        "attached",
    ),
    "engrammar.titan": ("retrieval", "model", "names", "optimizers", "metrics", "training", "config_registry"),
    "engrammar.attach": (
        "blocks",
        "around",
        "state",
        "skipping",
        "paged",
        "attached",
        "inputs",
        "passes",
        "fingerprints",
        "folder",
        "attaching",
        "prefix",
        "filling",
        "saving",
    ),
}
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
FILES = sorted(path for path in SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    fits = [part for part in FLOOR_OF if module == part or module.startswith(part + ".")]
    return max(fits, key=len)


MODULES = {module_of(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            found |= {inner if (inner := f"{module}.{alias.name}") in MODULES else module for alias in node.names}
    return {module for module in found if module in MODULES} - {module_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_imports_go_down(path):
    own = part_of(module_of(path))
    for module in imported(path):
        other = part_of(module)
        assert other == own or FLOOR_OF[other] < FLOOR_OF[own], f"{module_of(path)} imports {module}, which is above it"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_inside_a_room(room):
    order = {f"{room}.{name}": place for place, name in enumerate(ROOMS[room])}
    inside = [path for path in FILES if module_of(path).startswith(room + ".") and path.name != "__init__.py"]
    assert {module_of(path) for path in inside} == set(order)
    for path in inside:
        for module in imported(path) & set(order):
            assert order[module] < order[module_of(path)], f"{module_of(path)} imports {module}, which is above it"


def test_every_part_is_there():
    assert all(any(module == part or module.startswith(part + ".") for module in MODULES) for part in FLOOR_OF)


def test_the_core_imports_neither_lab_nor_command_line():
    for path in FILES:
        if module_of(path).split(".")[0] == "engrammar":
            assert not {module for module in imported(path) if module.split(".")[0] != "engrammar"}


def test_only_an_engine_imports_its_plug_in():
    """`import engrammar` must need neither vLLM nor torchtitan: the engines import these files."""
    for path in FILES:
        module = module_of(path)
        for one in imported(path):
            assert not one.startswith("engrammar.serve.vllm") or module.startswith("engrammar.serve.")
            assert not one.startswith("engrammar.serve") or not module.startswith("engrammar.") or "serve" in module
            assert not one.startswith("engrammar.titan") or module.startswith("engrammar.titan.")


def test_retrieval_and_fusion_never_import_each_other():
    retrieval = ("vocabulary", "addressing", "table", "memory")
    fusion = ("fusion", "model/hyper")
    for names, others in ((retrieval, fusion), (fusion, retrieval)):
        for name in names:
            forbidden = {"engrammar." + other.replace("/", ".") for other in others}
            assert not imported(SOURCE / "engrammar" / f"{name}.py") & forbidden


def test_the_lowest_floor_imports_no_tensor_library():
    tree = ast.parse((SOURCE / "engrammar" / "config.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not modules & {"torch", "numpy", "transformers", "safetensors"}


def test_no_file_knows_where_its_repository_is():
    """What is written goes where the caller says, from the current directory: never beside an installed package."""
    for path in FILES:
        assert "__file__).parent" not in path.read_text(), f"{path} looks for its repository"
