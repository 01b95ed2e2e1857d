"""What commands share: names, a flag, and optional requirements, of which each extra of the package brings some."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Annotated, Literal

from tyro.conf import arg

Json = Annotated[bool, arg(name="json", help="Print JSON.")]
MODULES = {
    "lab": ("matplotlib", "scipy", "fpdf", "PIL", "psutil"),
    "eval": ("lm_eval",),
    "serve": ("starlette", "uvicorn"),
    "explore": ("starlette", "uvicorn", "anyio"),
}


def by_name(*commands: Callable[..., None]) -> dict[str, Callable[..., None]]:
    """The commands by the names of their functions; import_ is import."""
    return {command.__name__.rstrip("_"): command for command in commands}


def require(extra: Literal["lab", "eval", "explore", "serve"]) -> None:
    """Checks that an extra is installed, so that a command does not fail for want of it after minutes of work.

    Raises:
        ValueError: a module is missing; the message names the command that installs it.
    """
    missing = [module for module in MODULES[extra] if find_spec(module) is None]
    if missing:
        raise ValueError(f"This command needs {', '.join(missing)}: pip install 'engrammar[{extra}]'.")
