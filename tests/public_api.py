"""Public names and their parameters, as text. `python tests/public_api.py` writes those of a release."""

import importlib
import inspect
import json
from pathlib import Path

from transformers import PreTrainedConfig

FILE = Path(__file__).parent / "public_api.json"
PACKAGES = ("engrammar", *(f"engrammar.{name}" for name in ("attach", "edit", "model", "stores", "tables", "train")))


def public_api() -> dict[str, str]:
    """By the dotted name of every public name, and of the public methods of public classes: its parameters."""
    found: dict[str, str] = {}
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            thing, dotted = getattr(package, name), f"{package.__name__}.{name}"
            found[dotted] = _signature(thing)
            if inspect.isclass(thing) and package.__name__ != "engrammar":
                for method, value in vars(thing).items():
                    if not method.startswith("_") and inspect.isroutine(inspect.unwrap(getattr(thing, method))):
                        found[f"{dotted}.{method}"] = _signature(inspect.unwrap(getattr(thing, method)))
                    elif not method.startswith("_") and isinstance(value, property):
                        found[f"{dotted}.{method}"] = "property"
    return dict(sorted(found.items()))


def _signature(thing: object) -> str:
    if not callable(thing):
        return type(thing).__name__
    if inspect.isclass(thing) and issubclass(thing, PreTrainedConfig):  # the rest is transformers' own
        return f"({', '.join(inspect.get_annotations(thing))})"
    try:
        signature = inspect.signature(thing)
    except ValueError:  # an alias of types
        return "alias"
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]  # types are written in many ways
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


if __name__ == "__main__":
    from engrammar import __version__

    FILE.write_text(json.dumps({"version": __version__, "names": public_api()}, indent=1) + "\n")
