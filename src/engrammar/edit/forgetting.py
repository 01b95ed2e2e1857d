"""Takes a fact out of a patch, and proves that it is out: no key, no row, no answer."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from engrammar.attach.blocks import device_of
from engrammar.edit.answers import answer, phrasings_of, probe_of, says
from engrammar.edit.applying import applied_patches, apply_patch, edits_of, undo_patch
from engrammar.edit.building import build_patch
from engrammar.edit.facts import Fact, as_fact
from engrammar.edit.patch import Key, Patch, RowDelta, value_rows
from engrammar.edit.uses import inner_rows


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """A patch without some of its facts.

    Attributes:
        facts: those that were taken out.
        before: the patch that held them.
        after: what is left; None if nothing is.
    """

    facts: list[Fact]
    before: Patch
    after: Patch | None


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What is left of forgotten facts.

    Attributes:
        keys: keys that only they had, and that are still there.
        rows: value rows, and rows of hashed tables, that only they had, and that are still there.
        answered: for each phrasing that was asked, the answer without any patch and with what is left.
        told: the phrasings whose answer is one of the forgotten objects and was not so without any patch.
    """

    keys: int
    rows: int
    answered: dict[str, tuple[str, str]]
    told: list[str]

    @property
    def holds(self) -> bool:
        return not self.keys and not self.rows and not self.told


def forget(
    patch: Patch,
    subject: str,
    prompt: str | None = None,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Forgotten:
    """Takes the facts about a subject out of a patch; what it does otherwise stays the same to the bit.

    Args:
        prompt: the prompt of one fact; None for all of the subject's.
        model, tokenizer: the model that the patch is for, without the patch. They are needed if it replaces rows of
            hashed tables: they say which rows the subject's n-grams read.

    Raises:
        ValueError: the patch holds no such fact, or other facts read rows of hashed tables that this one has changed;
            names them.
    """
    gone = [
        index
        for index, row in enumerate(patch.facts)
        if row.get("subject") == subject and prompt in (None, row.get("prompt"))
    ]
    if not gone:
        named = sorted({row.get("subject", "") for row in patch.facts})
        shown = ", ".join(map(repr, named[:5])) + (f" and {len(named) - 5} more" if len(named) > 5 else "")
        raise ValueError(f"The patch {patch.name!r} holds no such fact about {subject!r}; it is about {shown}.")
    _check_alone(patch, gone)
    deltas = _deltas_without(patch, gone, model, tokenizer) if patch.deltas else {}
    numbers = {old: new for new, old in enumerate(i for i in range(len(patch.facts)) if i not in gone)}
    kept = [replace(one, fact=numbers.get(one.fact, -1)) for one in patch.exact_entries() if one.fact not in gone]
    facts = [as_fact(patch.facts[i]) for i in gone]
    if not kept and not deltas:
        return Forgotten(facts=facts, before=patch, after=None)
    named_probes = {one.probe for one in kept}
    after = build_patch(
        patch.name,
        patch.base,
        kept,
        [probe for probe in patch.all_probes() if probe.name in named_probes],
        (patch.tables, deltas) if patch.tables is not None and deltas else None,
        facts=[row for i, row in enumerate(patch.facts) if i in numbers],
        names_V=patch.names_V(),
        provenance=patch.provenance,
        encoding=patch.encoding,
    )
    return Forgotten(facts=facts, before=patch, after=after)


def _check_alone(patch: Patch, gone: Sequence[int]) -> None:
    """Raises a ValueError if some facts have a value together with others, as method "vector" gives a subject one."""
    own = {one.fact for one in patch.exact_entries()}
    for index, row in enumerate(patch.facts):
        shared = [i for i, other in enumerate(patch.facts) if other.get("subject") == row.get("subject")]
        if own and index not in own and not own.isdisjoint(shared) and 0 < len({*shared} & {*gone}) < len(shared):
            named = ", ".join(repr(patch.facts[i].get("prompt")) for i in shared)
            raise ValueError(
                f"{row.get('subject')!r} has one value for {named}: forget all facts of the subject (give no prompt), "
                "and learn again what should stay."
            )


def _deltas_without(patch: Patch, gone: Sequence[int], model: Any, tokenizer: Any) -> dict[int, RowDelta]:
    """The row deltas of a patch but for those of some facts, which must be theirs alone."""
    if model is None or tokenizer is None:
        raise ValueError(
            f"{patch.name!r} replaces rows of hashed tables: give the model and its tokenizer, which say whose rows "
            "they are."
        )
    owners = _owners(patch, model, tokenizer)
    rows = {(layer, int(row)) for layer, delta in patch.deltas.items() for row in delta.rows_U}
    if unknown := rows - owners.keys():
        raise ValueError(
            f"No subject of {patch.name!r} reads {len(unknown)} of the {len(rows)} rows that it replaces, so they may "
            "be of any fact: learn the others again, and apply that patch instead."
        )
    mine = {place for place, facts in owners.items() if facts & set(gone)}
    if others := sorted({fact for place in mine for fact in owners[place]} - set(gone)):
        named = ", ".join(repr(patch.facts[fact].get("prompt")) for fact in others[:5])
        named += f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise ValueError(
            f"Rows of hashed tables that were changed for {patch.facts[gone[0]]['subject']!r} are also read for "
            f"{named}: learn those again without it, and apply that patch instead."
        )
    found = {}
    for layer, delta in patch.deltas.items():
        is_kept_U = np.array([(layer, int(row)) not in mine for row in delta.rows_U])
        if is_kept_U.any():
            arrays = {one.name: getattr(delta, one.name)[is_kept_U] for one in fields(delta)}
            found[layer] = RowDelta(**arrays)
    return found


def _owners(patch: Patch, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[tuple[int, int], set[int]]:
    """For each replaced row, by its layer, the facts whose subject's own n-grams read it.

    Raises:
        ValueError: the patch is not for this model, or is applied.
    """
    apply_patch(model, patch, tokenizer)  # checks that all is right
    edits = edits_of(model)
    assert edits is not None
    memory = edits.applied[-1].memory
    undo_patch(model, patch.name)
    assert memory is not None
    device = device_of(model)
    replaced = {layer: set(delta.rows_U.tolist()) for layer, delta in patch.deltas.items()}
    owners: dict[tuple[int, int], set[int]] = {}
    named = [(fact, row["subject"].strip()) for fact, row in enumerate(patch.facts) if row.get("subject")]
    for fact, subject in named:
        for spelling in (" " + subject, subject):
            ids = tokenizer(spelling, add_special_tokens=False).input_ids
            for layer, rows_H in inner_rows(ids, memory, device).items():
                for one in set(rows_H.tolist()) & replaced.get(layer, set()):
                    owners.setdefault((layer, one), set()).add(fact)
    return owners


def prove_forgotten(done: Forgotten, model: Any, tokenizer: PreTrainedTokenizerBase, num_tokens: int = 12) -> Proof:
    """Looks for what is left of facts, in the patch and in a model's answers to twenty phrasings of each.

    Args:
        model: the model, without the patch.

    Raises:
        ValueError: the patch is applied, so that there is no answer without it.
    """
    if done.before.name in applied_patches(model):
        raise ValueError(f"The patch {done.before.name!r} is applied: undo it, since answers without it are needed.")
    prompts = {p: f.object for f in done.facts for p in phrasings_of(f, probe_of(done.before, f))}
    plain = answer(model, tokenizer, list(prompts), num_tokens)
    now = plain
    if done.after is not None:
        apply_patch(model, done.after, tokenizer)
        try:
            now = answer(model, tokenizer, list(prompts), num_tokens)
        finally:
            undo_patch(model, done.after.name)
    told = [p for p, was, after in zip(prompts, plain, now) if says(after, prompts[p]) and not says(was, prompts[p])]
    answered = {prompt: (was, after) for prompt, was, after in zip(prompts, plain, now)}
    if done.after is None:
        return Proof(keys=0, rows=0, answered=answered, told=told)
    gone = {(fact.subject, fact.prompt) for fact in done.facts}
    facts = [(row.get("subject"), row.get("prompt")) for row in done.before.facts]
    others = {index for index, named in enumerate(facts) if named not in gone} | {-1}
    is_other_E = np.isin(done.before.column("fact"), sorted(others))
    keys, rows = _keys_and_rows(done.before, ~is_other_E)
    other_keys, other_rows = _keys_and_rows(done.before, is_other_E)
    keys_left, _ = _keys_and_rows(done.after, np.ones(len(done.after.entries), np.bool_))
    rows_left = {row.tobytes() for row in done.after.values}
    num_rows = len((rows - other_rows) & rows_left)
    if done.after.deltas:
        replaced = {(layer, int(row)) for layer, delta in done.after.deltas.items() for row in delta.rows_U}
        owners = _owners(done.before, model, tokenizer)
        num_rows += len({place for place, facts in owners.items() if not facts & others} & replaced)
    return Proof(keys=len((keys - other_keys) & keys_left), rows=num_rows, answered=answered, told=told)


def _keys_and_rows(patch: Patch, chosen_E: NDArray[np.bool_]) -> tuple[set[Key], set[bytes]]:
    """The keys of some entries, and their value rows as they are stored."""
    entries = np.nonzero(chosen_E)[0].tolist()
    rows = {patch.values[row].tobytes() for entry in entries for row in value_rows(patch, entry)}
    return {patch.key_of(entry) for entry in entries}, rows
