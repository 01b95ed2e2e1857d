"""What a patch holds, in lines of text."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from engrammar.edit.patch import Key, Patch, value_rows
from engrammar.edit.uses import uses
from engrammar.vocabulary import compress_vocabulary

TOKENS = 4096  # of a text that are read at a time


def shown_head(patch: Patch) -> str:
    """Name, base and sizes of a patch."""
    base = patch.base.model
    replaced = sum(len(delta.rows_U) for delta in patch.deltas.values())
    return (
        f"{patch.name}: for a {base['class']} of {base['blocks']} blocks of width {base['hidden_size']}; "
        f"{len(patch.keys_QK):,} keys, {len(patch.values):,} value rows"
        + (f", {replaced:,} rows of hashed tables" if replaced else "")
    )


def shown_facts(patch: Patch, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
    """A line for each fact: its words, its keys, its rows and with how many facts it shares them.

    Args:
        tokenizer: for the words of keys; without it, their classes are shown.
    """
    owners: dict[int, set[int]] = {}
    rows_of: dict[int, set[int]] = {}
    keys_of: dict[int, dict[Key, None]] = {}
    for entry, fact in enumerate(patch.column("fact").tolist()):
        keys_of.setdefault(fact, {})[patch.key_of(entry)] = None
        for number in value_rows(patch, entry):
            rows_of.setdefault(fact, set()).add(number)
            owners.setdefault(number, set()).add(fact)
    words = None if tokenizer is None else words_of_classes(tokenizer)
    for fact, row in enumerate(patch.facts):
        keys = ", ".join(_shown(key, words) for key in keys_of.get(fact, {}))
        own = rows_of.get(fact, set())
        others = set().union(*(owners[one] for one in own)) - {fact} if own else set()
        shared = f"; it shares some with {len(others)} facts" if others else ""
        yield f"{' | '.join(row.values())} | keys {keys or 'none'} | {len(own)} rows{shared}"


def words_of_classes(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The text of the first id of each class."""
    classes_V = compress_vocabulary(tokenizer)
    first = np.unique(classes_V, return_index=True)
    return {int(one): str(tokenizer.decode([int(index)])) for one, index in zip(*first)}


def _shown(key: Key, words: dict[int, str] | None) -> str:
    return str(list(key)) if words is None else repr("".join(words[one] for one in key))


def shown_uses(patch: Patch, tokenizer: PreTrainedTokenizerBase, text: Path) -> list[str]:
    """How often the keys of a patch occur in a text file.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        read = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {text} ({error}): give a text file in UTF-8.") from error
    ids = tokenizer(read, return_tensors="pt", add_special_tokens=False).input_ids
    found = uses(patch, ids.split(TOKENS, 1), compress_vocabulary(tokenizer))
    words = words_of_classes(tokenizer)
    lines = [f"{sum(found.keys.values()):,} of {found.num_tokens:,} tokens of {text} end a key"]
    return lines + [f"    {count:,} times {_shown(key, words)}" for key, count in found.keys.most_common()]
