"""Documents that nearly repeat an earlier one, found by MinHash over their word 5-grams (datasketch)."""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from engrammar.train.documents import data_library

WORDS = 5  # of a shingle
NUM_HASHES = 64  # a similarity is estimated to about 1/16


def near_duplicates(texts: Iterable[str], similarity: float) -> set[int]:
    """The positions of texts of whose word 5-grams an earlier, kept text shares at least `similarity` (Jaccard).

    Words are compared without case. The shares are estimates; the same texts in the same order give the same answer.

    Raises:
        ValueError: datasketch is not installed.
    """
    datasketch = data_library("datasketch", "near-duplicates are found", "set data.similarity to null")
    index = datasketch.MinHashLSH(threshold=similarity, num_perm=NUM_HASHES)
    kept: dict[int, Any] = {}
    dropped: set[int] = set()
    for position, text in enumerate(tqdm(texts, desc="finding near-duplicates", unit=" documents", delay=2)):
        words = text.casefold().split()
        signature = datasketch.MinHash(NUM_HASHES)
        signature.update_batch(
            {" ".join(words[at : at + WORDS]).encode() for at in range(max(1, len(words) - WORDS + 1))}
        )
        if any(signature.jaccard(kept[other]) >= similarity for other in index.query(signature)):
            dropped.add(position)
        else:
            kept[position] = signature
            index.insert(position, signature)
    return dropped
