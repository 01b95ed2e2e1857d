"""Learning in parts: each is kept in a folder as soon as it is learned, so that a killed run goes on where it was.

What a part says depends on the request alone, so a run that was killed and one that was not end with the same bits.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, final

from engrammar.edit.facts import Fact, Refused
from engrammar.edit.files import patch_digest, read_patch, write_patch
from engrammar.edit.patch import Patch
from engrammar.tables.sealed import write_text


class Part(NamedTuple):
    """What was learned of some facts: a patch (None if all were refused), and those that were refused."""

    patch: Patch | None
    refused: list[Refused]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Facts that are learned together, and what does it."""

    facts: tuple[Fact, ...]
    learn: Callable[[], Part]


@final
class KeptParts:
    """A folder of the parts that were learned so far. A part is called by a digest of the request and of its facts.

    Raises:
        ValueError: the folder is another request's; names what differs.
    """

    def __init__(self, folder: Path, request: str) -> None:
        self.folder, self.request = folder, request
        folder.mkdir(parents=True, exist_ok=True)
        told = folder / "request.json"
        if told.exists() and (there := told.read_text(encoding="utf-8", errors="replace")) != request:
            raise ValueError(
                f"{folder} holds what another request has learned so far ({_differs(there, request)}): repeat that "
                "request to go on, or delete the folder to begin anew."
            )
        write_text(told, request)

    def learn(self, unit: Unit) -> Part:
        """The part of a unit, learned now if it is not there."""
        asked = json.dumps([self.request, [asdict(fact) for fact in unit.facts]])
        stem = hashlib.sha256(asked.encode()).hexdigest()[:32]
        rows, about = self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"
        if about.exists():
            told = json.loads(about.read_text())
            patch = read_patch(rows) if told["patch"] else None
            if patch is None or patch_digest(patch) == told["patch"]:
                return Part(
                    patch, [Refused(fact=unit.facts[one["fact"]], reason=one["reason"]) for one in told["refused"]]
                )
        part = unit.learn()
        if part.patch is not None:
            write_patch(part.patch, rows)
        refused = [{"fact": unit.facts.index(one.fact), "reason": one.reason} for one in part.refused]
        told = {"patch": None if part.patch is None else patch_digest(part.patch), "refused": refused}
        write_text(about, json.dumps(told))
        return part


def _differs(there: str, here: str) -> str:
    """What is another in a request that was kept."""
    try:
        was, now = json.loads(there), json.loads(here)
        others = [f"other {name}" for name in now if name != "settings" and was[name] != now[name]]
        if was["method"] == now["method"]:
            pairs = [(name, was["settings"].get(name), value) for name, value in now["settings"].items()]
            others += [f"{name} {before!r} there, {value!r} here" for name, before, value in pairs if before != value]
        return "; ".join(others) or "other words"
    except (ValueError, AttributeError, TypeError, KeyError):
        return "its request.json is damaged"
