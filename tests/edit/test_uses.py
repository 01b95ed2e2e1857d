"""What a patch touches in a text, counted by plain loops beside it."""

from collections import Counter

import torch

from attached_models import random_ids, tokenizer
from edited_models import WITH_MEMORY, classes, key, model_of_kind, plain_found, rich_entries, rich_patch, spoken_ids
from engrammar.edit import base_of, build_patch, replace_rows, uses
from engrammar.edit.applying import memories_of
from engrammar.reference import hash_ngrams_reference


def test_keys_are_counted_as_they_occur():
    model, batches = model_of_kind("llama"), [spoken_ids(2, 19), spoken_ids(3, 11, seed=8)]
    batches[1][0, :4] = -1
    found = uses(rich_patch(model), batches, classes())
    rows = [row for batch in batches for row in batch.tolist()]
    plain = Counter(one for row in rows for one in plain_found(rich_entries(), row) if one is not None)
    assert found.keys == plain and found.num_tokens == 2 * 19 + 3 * 11 - 4 and not found.rows


def test_rows_are_counted_by_the_n_grams_that_read_them():
    """A table of 97 and more rows, read by more n-grams than it has rows: some collide."""
    model, ids = model_of_kind(WITH_MEMORY), random_ids(4, 60)
    memory = memories_of(model)[0]
    rows = memory.addresses(ids[:1, 5:12])[2].unique()
    patch = build_patch(
        "p", base_of(model, tokenizer()), rows=replace_rows(memory, {2: (rows, torch.zeros(len(rows), 6))})
    )
    found, plain = uses(patch, [ids], classes(), memory), {}
    for row in ids.tolist():
        seen = [key(one)[0] for one in row]
        chosen = {"config": memory.config, "geometry": memory.geometry, "layer_index": 1}
        for token, columns in enumerate(hash_ngrams_reference(seen, **chosen)):
            for column, number in enumerate(columns):
                if number in rows:
                    order = memory.config.orders[column // memory.config.num_heads]
                    padded = [memory.geometry.fill_class] * order + seen[: token + 1]
                    plain.setdefault((2, number), Counter())[tuple(padded[-order:])] += 1
    assert found.rows == plain
    assert found.collisions and all(len(ngrams) > 1 for ngrams in found.collisions.values())
