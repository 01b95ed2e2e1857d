"""How n-grams share rows and how often rows are read: collisions, hot rows, Zipf's law, rows that no text touches.

N-grams are those that the model reads from blocks of a text (`frequency.text_keys`).
Letters: F tokens of a whole text, D distinct n-grams of an order, K heads of an order, R rows.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engrammar.addressing import hash_ngrams_numpy
from engrammar.memory import Memory
from engrammar.planning.touches import Sample, repeated_share, touched_rows
from engrammar.train.data import TokenSet
from engrammar_lab.frequency import classes_seen, ngram_keys, text_keys

WINDOW = 1_000  # tokens over which distinct rows are counted
FIT_POINTS = 50  # number of ranks in a Zipf fit, evenly spaced in their logarithm


def distinct(keys_F: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first place of each distinct key, place_D, and how often the key occurs, count_D."""
    order_F = np.argsort(keys_F, kind="stable")
    ascending_F = keys_F[order_F]
    starts_D = np.flatnonzero(np.append(True, ascending_F[1:] != ascending_F[:-1]))
    return order_F[starts_D], np.diff(np.append(starts_D, len(keys_F)))


def collisions(
    rows_DK: NDArray[np.int64], count_D: NDArray[np.int64], sizes_K: tuple[int, ...]
) -> dict[str, int | float]:
    """How many n-grams of one order share rows, compared with a random hash.

    With a random hash, an n-gram is alone in its row of a head of R rows with chance (1 - 1/R)^(D-1), independently in
    each head. So it shares its row in a head with 1 minus that chance, and in all heads with the product of these. It
    shares all its rows with one other n-gram with chance 1 - (1 - 1/(R_1 ... R_K))^(D-1). The same holds for tokens.

    Args:
        rows_DK: head-local row of each distinct n-gram.
        count_D: tokens at which it occurs.
        sizes_K: rows of each head.

    Returns:
        the number of `distinct` n-grams, and `ngrams_per_row`. Shares of n-grams, each with the `_expected` share for a
        random hash: `in_a_head` (share their row, mean over heads), `in_all_heads` (share it in every head, with any
        others), `same_rows` (share all rows with one other n-gram). `tokens_in_a_head` and `tokens_in_all_heads` are
        the same over token positions. `own_lookups`: of the lookups of a token's rows, the share that is by its own
        n-gram, mean over heads and tokens.
    """
    num, sizes = len(rows_DK), np.array(sizes_K, dtype=np.float64)
    shared_DK = np.stack([np.bincount(rows_D)[rows_D] > 1 for rows_D in rows_DK.T], axis=1)
    read_DK = np.stack([np.bincount(rows_D, weights=count_D)[rows_D] for rows_D in rows_DK.T], axis=1)
    _, twins = distinct(ngram_keys(list(rows_DK.T)))
    alone_K = np.exp((num - 1) * np.log1p(-1 / sizes))
    return {
        "distinct": num,
        "ngrams_per_row": num / float(sizes.mean()),
        "in_a_head": float(shared_DK.mean()),
        "in_a_head_expected": float((1 - alone_K).mean()),
        "in_all_heads": float(shared_DK.all(1).mean()),
        "in_all_heads_expected": float((1 - alone_K).prod()),
        "same_rows": float(twins[twins > 1].sum() / num),
        "same_rows_expected": float(-np.expm1((num - 1) * np.log1p(-1 / sizes.prod()))),
        "tokens_in_a_head": float(np.average(shared_DK.mean(1), weights=count_D)),
        "tokens_in_all_heads": float(np.average(shared_DK.all(1), weights=count_D)),
        "own_lookups": float(np.average((count_D[:, None] / read_DK).mean(1), weights=count_D)),
    }


def zipf_exponent(counts: NDArray[np.int64], first: int, last: int) -> float:
    """The s of count ~ rank^-s, by least squares on log count against log rank, over ranks `first` to `last`.

    Rank 1 has the highest count. Up to `FIT_POINTS` ranks, evenly spaced in their logarithm, are fitted, so that each
    decade of ranks weighs the same.

    Raises:
        ValueError: the range has under two ranks with a count above 0.
    """
    descending = np.sort(counts[counts > 0])[::-1]
    if not 1 <= first < last <= len(descending):
        raise ValueError(f"The ranks are {first} to {last}; allowed: two or more in 1 to {len(descending)}.")
    ranks = np.unique(np.geomspace(first, last, FIT_POINTS).round().astype(np.int64))
    return -float(np.polyfit(np.log(ranks), np.log(descending[ranks - 1]), 1)[0])


def row_traffic(count_R: NDArray[np.int64]) -> dict[str, Any]:
    """How lookups are distributed over the rows of a layer, all its heads together.

    Args:
        count_R: how often each row is read.

    Returns:
        `rows`, their number; `untouched`, the share never read; `hottest_1_percent` and `hottest_10_percent`, the share
        of lookups that these rows get; `zipf`, the exponent and the ranks it was fitted on, from 10 to a tenth of the
        rows touched (None if under 1,000 are).
    """
    rising = np.cumsum(np.sort(count_R)[::-1]) / count_R.sum()
    return {
        "rows": len(count_R),
        "untouched": float((count_R == 0).mean()),
        **{f"hottest_{share}_percent": float(rising[-(-len(count_R) * share // 100) - 1]) for share in (1, 10)},
        "zipf": _zipf(count_R),
    }


def _zipf(counts: NDArray[np.int64]) -> dict[str, Any] | None:
    first, last = 10, int((counts > 0).sum()) // 10
    if last < 100:
        return None
    return {"exponent": zipf_exponent(counts, first, last), "ranks": [first, last]}


def memory_traffic(memory: Memory, tokens: TokenSet, *, length: int, window_tokens: int = 100_000) -> dict[str, Any]:
    """Collisions and row traffic of a memory over the training text. Reads addresses only, never a row.

    Args:
        memory: a model's memory; for a geometry without a model, `Memory(..., tables="external")` with its classes set.
        length: tokens of a block, as the model was trained.
        window_tokens: number of tokens, from the start of the text, in whose windows distinct rows are counted.

    Returns:
        `tokens`, and per layer: under `orders`, per order the `collisions` and `zipf` of its n-grams; `row_traffic`;
        `untouched_expected` of a random hash; and `distinct_rows_per_1000_tokens` of `lookups_per_1000_tokens`.
    """
    num_tokens = len(tokens.blocks("train", length)) * length
    ids_F = tokens.read("train", 0, num_tokens)
    ngrams = [distinct(text_keys(memory, tokens, length=length, order=order)) for order in memory.config.orders]
    found: dict[str, Any] = {"tokens": num_tokens, "layers": {}}
    for index, layer in enumerate(memory.config.layers):
        orders, counts, untouched = {}, [], 0.0
        for index_order, (order, (place_D, count_D)) in enumerate(zip(memory.config.orders, ngrams)):
            sizes_K = memory.geometry.table_sizes[index][index_order]
            rows_DK = _rows_at(memory, ids_F, place_D, length, index, index_order)
            orders[str(order)] = collisions(rows_DK, count_D, sizes_K) | {"zipf": _zipf(count_D)}
            for rows_D, size in zip(rows_DK.T, sizes_K):
                counts.append(np.bincount(rows_D, weights=count_D, minlength=size).astype(np.int64))
                untouched += size * float(np.exp(len(place_D) * np.log1p(-1 / size)))
        traffic = row_traffic(np.concatenate(counts))
        found["layers"][str(layer)] = {
            "orders": orders,
            **traffic,
            "untouched_expected": untouched / traffic["rows"],
            **_distinct_per_window(memory, ids_F[:window_tokens], index),
        }
    return found


def _rows_at(
    memory: Memory, ids_F: NDArray[np.int64], place_D: NDArray[np.int64], length: int, index: int, index_order: int
) -> NDArray[np.int64]:
    """rows_DK: head-local rows of one order for the n-grams that end at these places of the training text.

    An n-gram reads no further back than its block, so each one is hashed in a short row of its own.
    """
    num_back, num_heads = memory.config.max_ngram_size - 1, memory.config.num_heads
    back_N = np.arange(-num_back, 1)
    ids_DN = np.where(place_D[:, None] % length + back_N >= 0, ids_F[place_D[:, None] + back_N], -1)
    arrays = [np.ascontiguousarray(seen_DN[:, -1:]) for seen_DN in classes_seen(memory, torch.from_numpy(ids_DN))]
    rows_DH = hash_ngrams_numpy(arrays, config=memory.config, geometry=memory.geometry, layer_index=index)[:, 0]
    rows_DH = rows_DH - np.array(memory.geometry.head_offsets(index))
    return rows_DH[:, index_order * num_heads : (index_order + 1) * num_heads]


def _distinct_per_window(memory: Memory, ids_F: NDArray[np.int64], index: int) -> dict[str, float]:
    sample = Sample.of_documents([ids_F], WINDOW)
    classes_V = None if memory.class_of_id is None else memory.class_of_id.cpu().numpy()
    rows_FH = touched_rows(sample, memory.config, memory.geometry, classes_V, index)
    lookups = WINDOW * memory.config.num_columns
    repeated = repeated_share(rows_FH, sample, memory.geometry.num_stored_rows(index))
    return {"distinct_rows_per_1000_tokens": (1 - repeated) * lookups, "lookups_per_1000_tokens": lookups}
