"""Our own ways to change facts: patches by each method of `engrammar.edit.learn`."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engrammar.edit import Fact, Patch, apply_patch, learn, undo_patch, write_patch
from engrammar.edit.learning import Method
from engrammar_lab.editing.edited import Edited, Model, Way

PART = 100  # facts that are learned at a time where they come in sequence


def by_patch(method: Method, *, in_parts: bool = False) -> Way:
    """A patch of all facts; in parts, one patch after another, each learned while those before are applied."""

    def way(model: Model, tokenizer: Any, facts: Sequence[Fact], seed: int) -> Edited:
        refused: list[Fact] = []
        names: list[str] = []
        num_bytes = 0
        size = PART if in_parts else len(facts)
        for first in range(0, len(facts), size):
            name, part = f"facts-{first}", facts[first : first + size]
            try:
                patch, left_out = learn(model, tokenizer, part, name=name, method=method)
            except ValueError as error:
                if not str(error).startswith("No fact can be"):
                    raise
                refused += part
                continue
            refused += [one.fact for one in left_out]
            apply_patch(model, patch, tokenizer, on_conflict="replace")
            names.append(name)
            num_bytes += file_size(patch)

        def undo() -> None:
            for name in names:
                undo_patch(model, name)

        return Edited(undo=undo, num_bytes=num_bytes, refused=refused)

    return way


def file_size(patch: Patch) -> int:
    """Bytes of a patch's file."""
    with TemporaryDirectory() as folder:
        write_patch(patch, Path(folder) / "patch.safetensors")
        return (Path(folder) / "patch.safetensors").stat().st_size
