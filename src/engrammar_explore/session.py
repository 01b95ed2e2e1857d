"""One model that is being explored: texts that were looked at, patches that are known, applied and taken back.

Everything here is called by one thread at a time: `serving` sees to it.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

from torch import nn
from transformers import PreTrainedTokenizerBase

from engrammar.attach.blocks import find_decoder
from engrammar.edit import Fact, GatedSettings, Patch, applied_patches, apply_patch, conflicts, diff, undo_patch
from engrammar.edit.files import parse_patch, patch_bytes
from engrammar.edit.gated import GatedReader
from engrammar.edit.learning import Request, learn_units
from engrammar_explore.census import Census
from engrammar_explore.looking import Known, LookSettings, Seen, closer, overview, see
from engrammar_explore.trying import Progress, TrySettings, try_fact
from engrammar_explore.watching import comparisons, places_of

MOST_SEEN = 4  # texts whose passes are kept
MOST_PATCHES = 64


@dataclass(frozen=True, kw_only=True)
class Explored:
    """What is explored."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    title: str  # what the page calls the model
    census: Census | None = None  # which n-grams of a corpus share rows
    kept: Path | None = None  # a folder in which what is read for all facts alike is kept for other sessions


@final
class Session:
    """A model, and what a page has done with it."""

    def __init__(self, explored: Explored, settings: LookSettings | None = None, patches: Sequence[Patch] = ()) -> None:
        self.explored, self.settings = explored, settings or LookSettings()
        self.known = Known.of(explored.model)
        self.version = 0  # how often patches were applied or undone
        self.patches = {patch.name: patch for patch in patches}  # known ones by name, applied or not
        self.tried: dict[str, dict[str, Any]] = {}
        self._seen: OrderedDict[tuple[Any, ...], Seen] = OrderedDict()
        for patch in patches:
            self.apply(patch.name)

    def close(self) -> None:
        """Takes all patches back and leaves the model as it was."""
        if applied_patches(self.explored.model):
            undo_patch(self.explored.model)
        self.known.close()

    def about(self) -> dict[str, Any]:
        """The model, its memories, and its patches, in words and numbers."""
        model, tokenizer = self.explored.model, self.explored.tokenizer
        decoder = find_decoder(model)
        memories = [
            {
                "name": place.name,
                "layer": place.layer,
                "orders": list(place.memory.config.orders),
                "heads": place.memory.config.num_heads,
                "rows": place.memory.table(place.layer).shape[0],
                "width": place.memory.config.head_dim,
                "branches": place.fusion.num_branches,
            }
            for place in places_of(model)
        ]
        census = None if self.explored.census is None else self.explored.census.about
        return {
            "title": self.explored.title,
            "class": type(decoder.host).__name__,
            "blocks": len(decoder.blocks),
            "hidden": decoder.hidden_size,
            "ids": len(tokenizer),
            "most_tokens": self.settings.most_tokens,
            "memories": memories,
            "comparisons": comparisons(model),
            "census": None if census is None else {key: census[key] for key in ("corpus", "tokens", "forgotten")},
            "version": self.version,
            "patches": self.told_patches(),
        }

    def told_patches(self) -> list[dict[str, Any]]:
        """The patches that are known: names, facts in words, sizes, and whether they are applied."""
        applied = applied_patches(self.explored.model)
        return [
            {
                "name": name,
                "applied": name in applied,
                "facts": [dict(fact) for fact in patch.facts],
                "keys": len(patch.keys_QK),
                "rows": sum(len(delta.rows_U) for delta in patch.deltas.values()),
                "bytes": len(patch_bytes(patch)),
                "tried": self.tried.get(name),
            }
            for name, patch in self.patches.items()
        ]

    def look(self, text: str, compare: Any = "first") -> dict[str, Any]:
        """`overview` of a text. A comparison that the model does not have any more counts as none given."""
        return overview(self._see(text, compare)) | {"version": self.version}

    def closer(self, text: str, compare: Any, place: int) -> dict[str, Any]:
        """`closer` of a token of a text, which is passed through the model again unless it was looked at lately."""
        return closer(self._see(text, compare), place, self.explored.census) | {"version": self.version}

    def _see(self, text: str, compare: Any) -> Seen:
        if compare not in comparisons(self.explored.model):
            compare = "first"
        key = (self.version, compare, text)
        if key not in self._seen:
            settings = replace(self.settings, compare=compare)
            self._seen[key] = see(self.explored.model, self.explored.tokenizer, text, settings, self.known)
            while len(self._seen) > MOST_SEEN:
                self._seen.popitem(last=False)
        self._seen.move_to_end(key)
        return self._seen[key]

    def learn(
        self, fact: Fact, keep: Sequence[str] = (), progress: Progress = lambda done, total, what: None
    ) -> dict[str, Any]:
        """Makes a patch of one fact and tries it. It is known afterwards, and not applied.

        Returns:
            "name" of the patch, and "tried", as `try_fact` returns it.

        Raises:
            ValueError: the fact cannot be written, or too many patches are known.
        """
        self._check_room()
        progress(0, 1, "learning")
        model, tokenizer = self.explored.model, self.explored.tokenizer
        units = self._reader.facts_in_units([fact])
        patch, _ = learn_units(Request(units, "one fact"), name=self._free_name(fact.subject))
        tried = try_fact(model, tokenizer, patch, fact, TrySettings(keep=keep), progress)
        self.patches[patch.name], self.tried[patch.name] = patch, tried
        return {"name": patch.name, "tried": tried}

    @cached_property
    def _reader(self) -> GatedReader:
        """What the second fact that is learned need not read again."""
        return GatedReader(self.explored.model, self.explored.tokenizer, GatedSettings(), self.explored.kept)

    def _check_room(self) -> None:
        if len(self.patches) >= MOST_PATCHES:
            raise ValueError(f"{MOST_PATCHES} patches are known already: forget some, or save them.")

    def _free_name(self, subject: str) -> str:
        stem = re.sub(r"[^A-Za-z0-9]+", "-", subject).strip("-").lower()[:40] or "fact"
        taken = {*self.patches, *applied_patches(self.explored.model)}
        return next(
            name for number in range(1, 1000) if (name := stem if number == 1 else f"{stem}-{number}") not in taken
        )

    def apply(self, name: str) -> None:
        """Applies a known patch; raises a ValueError if it is in conflict with another one, or is applied."""
        apply_patch(self.explored.model, self._patch(name), self.explored.tokenizer)
        self._changed()

    def undo(self, name: str) -> None:
        """Takes a patch back; raises a ValueError if it is not applied."""
        if not applied_patches(self.explored.model):
            raise ValueError("No patch is applied.")
        undo_patch(self.explored.model, name)
        self._changed()

    def forget(self, name: str) -> None:
        """Drops a known patch; raises a ValueError while it is applied."""
        self._patch(name)
        if name in applied_patches(self.explored.model):
            raise ValueError(f"{name} is applied: undo it first.")
        del self.patches[name]
        self.tried.pop(name, None)

    def save(self, name: str) -> bytes:
        """The bytes of a patch's file."""
        return patch_bytes(self._patch(name))

    def load(self, data: bytes) -> str:
        """Takes a patch from the bytes of a file, and returns its name. It is not applied.

        Raises:
            ValueError: it is no patch, it is damaged, or one of its name is known.
        """
        self._check_room()
        patch = parse_patch(data, Path("the file"))
        if patch.name in self.patches:
            raise ValueError(f"A patch {patch.name!r} is known already: forget it first.")
        self.patches[patch.name] = patch
        return patch.name

    def compare(self, one: str, other: str) -> dict[str, Any]:
        """How two known patches differ: what only one changes, what both change differently, and facts in words."""
        first, second = self._patch(one), self._patch(other)
        found = diff(first, second)
        facts = [[dict(fact) for fact in patch.facts] for patch in (first, second)]
        return {
            "only_first": len(found.only_first),
            "only_second": len(found.only_second),
            "changed": len(found.changed),
            "conflicts": [str(one.place) for one in conflicts(first, second)[:20]],
            "facts_only_first": [fact for fact in facts[0] if fact not in facts[1]],
            "facts_only_second": [fact for fact in facts[1] if fact not in facts[0]],
            "same_base": first.base.model == second.base.model,
        }

    def whole(self, text: str, compare: Any, progress: Progress = lambda done, total, what: None) -> dict[str, Any]:
        """All that a page shows of a text: `about`, `overview`, and `closer` of each token under "details"."""
        seen = self._see(text, compare)
        details = []
        for place in range(len(seen.ids_T)):
            progress(place, len(seen.ids_T), "tokens")
            details.append(closer(seen, place, self.explored.census))
        return {"about": self.about(), "look": overview(seen) | {"version": self.version, "details": details}}

    def _changed(self) -> None:
        self.version += 1
        self._seen.clear()

    def _patch(self, name: str) -> Patch:
        if name not in self.patches:
            raise ValueError(f"No patch {name!r:.80} is known; known are {', '.join(self.patches) or 'none'}.")
        return self.patches[name]
