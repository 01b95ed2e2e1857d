"""Which stored rows a text touches, and what a cache of them would hit.

Hit rates are those of the sample's second half; a cache is prepared with the first half only.
Letters: T tokens of the sample (B: as a batch of one), H columns (rows that a token touches in one layer), V ids,
D distinct rows, F or U rows asked for, G rows that hit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from engrammar.addressing import hash_ngrams_numpy, look_back
from engrammar.config import Geometry, MemoryConfig
from engrammar.stores.base import Arrived, Fetch, RowStore
from engrammar.stores.cache import CachedStore
from engrammar.tables.headers import PAGE
from engrammar.train.data import TokenSet
from engrammar.train.documents import read_documents

CALL_TOKENS = 32  # tokens whose rows are asked of the simulated cache at once


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Text as prompts, one after the other."""

    ids_T: NDArray[np.int64]
    prompt_T: NDArray[np.int64]  # the number of the prompt that each token belongs to, ascending from 0

    @property
    def starts_T(self) -> NDArray[np.bool_]:
        """True where a prompt begins."""
        return np.diff(self.prompt_T, prepend=-1) != 0

    @classmethod
    def of_documents(cls, documents: list[NDArray[np.int64]], prompt_tokens: int) -> "Sample":
        """Cuts documents into prompts of at most `prompt_tokens` tokens."""
        ids_T = np.concatenate([np.zeros(0, np.int64), *documents])
        starts = [np.arange(len(document)) % prompt_tokens == 0 for document in documents]
        return cls(ids_T=ids_T, prompt_T=np.cumsum(np.concatenate([np.zeros(0, bool), *starts])) - 1)


def is_prepared(corpus: str) -> bool:
    """Whether a corpus is a folder of tokens that `engrammar data` wrote."""
    return (Path(corpus) / "tokens.json").exists()


def read_sample(
    corpus: str, tokenizer: PreTrainedTokenizerBase, *, num_tokens: int, prompt_tokens: int, cache: Path
) -> Sample:
    """Reads the first tokens of a corpus.

    Args:
        corpus: a folder that `engrammar data` wrote with this tokenizer, or any source of `read_documents`.
        cache: the folder of downloaded corpora.

    Raises:
        ValueError: the corpus cannot be read, or has fewer than 2 tokens.
    """
    documents = list[NDArray[np.int64]]()
    if is_prepared(corpus):
        ids_T = TokenSet.open(Path(corpus)).read("train", 0, num_tokens)
        ends = np.flatnonzero(ids_T == tokenizer.eos_token_id) + 1
        documents = [document for document in np.split(ids_T, ends) if len(document)]
    else:
        left = num_tokens
        with tqdm(desc=f"reading {corpus}", total=num_tokens, unit="token", delay=2, leave=False) as bar:
            for text in read_documents(corpus, cache=cache):
                document = np.array(tokenizer(text, verbose=False).input_ids[:left], dtype=np.int64)
                documents.append(document)
                bar.update(len(document))
                left -= len(document)
                if left == 0:
                    break
    sample = Sample.of_documents(documents, prompt_tokens)
    if len(sample.ids_T) < 2:
        raise ValueError(f"{corpus} has {len(sample.ids_T)} tokens: give a text of at least 2, better of a million.")
    return sample


def touched_rows(
    sample: Sample, memory: MemoryConfig, geometry: Geometry, classes_V: NDArray[np.int64] | None, index: int
) -> NDArray[np.int64]:
    """Returns rows_TH, the stored rows that each token touches in the index-th memory layer, as in `Memory`."""
    seen = look_back(
        torch.from_numpy(sample.ids_T)[None],
        config=memory,
        geometry=geometry,
        classes_V=None if classes_V is None else torch.from_numpy(classes_V),
        starts_BT=torch.from_numpy(sample.starts_T)[None],
    )
    arrays = [np.ascontiguousarray(seen_BT.numpy()) for seen_BT in seen]
    return np.ascontiguousarray(hash_ngrams_numpy(arrays, config=memory, geometry=geometry, layer_index=index)[0])


def hot_rows(rows_TH: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns rows_D, the most touched row first; of rows touched equally often, the smaller number first."""
    rows_D, count_D = np.unique(rows_TH, return_counts=True)
    return rows_D[np.argsort(-count_D, kind="stable")]


def save_hot_rows(rows: dict[int, NDArray[np.int64]], path: Path) -> None:
    """Writes the rows to pin of each layer, for `stores.serving.load_hot_rows`."""
    save_file({str(layer): np.ascontiguousarray(rows_D) for layer, rows_D in rows.items()}, path)


def pinned_hits(known: NDArray[np.int64], asked: NDArray[np.int64]) -> NDArray[np.int64]:
    """At index s from 0 to D, how many of the rows `asked` hit if the first s of `hot_rows(known)` are pinned."""
    pinned_D = hot_rows(known)
    order_D = np.argsort(pinned_D)
    ascending_D, asked_F = pinned_D[order_D], asked.ravel()
    place_F = np.minimum(np.searchsorted(ascending_D, asked_F), len(ascending_D) - 1)
    rank_G = order_D[place_F[ascending_D[place_F] == asked_F]]
    return np.append(0, np.cumsum(np.bincount(rank_G, minlength=len(pinned_D))))


def seen_share(known: NDArray[np.int64], asked: NDArray[np.int64]) -> float:
    """Share of the rows `asked` that were touched before, in `known` or in `asked`. No cache of any size hits more."""
    return (asked.size - len(np.setdiff1d(asked, known))) / asked.size


@final
class _Counted(RowStore):
    """Rows without content, for a cache whose hits alone are counted."""

    def __init__(self, num_rows: int) -> None:
        self.name = self.identity = "a simulated table"
        self.num_rows, self.row_bytes = num_rows, 1

    def _fetch(self, rows_U: NDArray[np.int64]) -> Fetch:
        return Arrived(np.zeros((len(rows_U), 1), np.uint8))

    def close(self) -> None:
        pass


def cached_share(rows_TH: NDArray[np.int64], num_rows: int, cache_rows: int) -> float:
    """Hit rate of a `CachedStore` over the second half, after it has read the first; nothing is pinned."""
    cache = CachedStore(_Counted(num_rows), cache_rows)
    half = len(rows_TH) // 2
    for part_TH in (rows_TH[:half], rows_TH[half:]):
        cache.reset_counts()
        for first in range(0, len(part_TH), CALL_TOKENS):
            cache.fetch(part_TH[first : first + CALL_TOKENS].ravel()).wait()
    share = cache.hit_rate
    cache.close()
    return share


def repeated_share(rows_TH: NDArray[np.int64], sample: Sample, num_rows: int) -> float:
    """Share of touches whose row the same prompt touched before: what one deduplicated fetch of the prompt saves."""
    return 1 - num_distinct(sample.prompt_T[:, None] * num_rows + rows_TH) / rows_TH.size


def pages_per_token(rows_TH: NDArray[np.int64], sample: Sample, row_bytes: int) -> tuple[float, float]:
    """Distinct 4 KiB pages per token: if tokens are read one by one, and if each prompt is one fetch."""
    first_TH, last_TH = rows_TH * row_bytes // PAGE, (rows_TH * row_bytes + row_bytes - 1) // PAGE
    most = (row_bytes + PAGE - 2) // PAGE + 1  # pages of a row that begins at a page's last byte
    pages_TH = np.concatenate([np.minimum(first_TH + step, last_TH) for step in range(most)], axis=1)
    pages_TH.sort(axis=1)
    alone = len(pages_TH) + np.count_nonzero(np.diff(pages_TH, axis=1))
    together = num_distinct(sample.prompt_T[:, None] * (pages_TH.max() + 1) + pages_TH)
    return alone / len(rows_TH), together / len(rows_TH)


def num_distinct(values: NDArray[np.int64]) -> int:
    """`len(np.unique(values))`, ten times as fast: np.unique hashes, this sorts."""
    return 1 + int(np.count_nonzero(np.diff(np.sort(values, axis=None))))
