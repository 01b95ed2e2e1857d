"""A census: which n-grams a corpus has, how often, and so which of them share a row of a memory's tables.

The file is safetensors. For each order N: `classes.N` I32 [G, N], the distinct n-grams, ascending; `counts.N` I64 [G].
For each memory layer L and column H: `sorted.L.H` I32 [G], the n-grams of its order by the row that they read. Rows are
not stored: they follow from classes, so a row is found by bisection. `ids` I32 [C] is an id of each class, for names.
Letters: G distinct n-grams of an order, N their order, L memory layers, H columns, T tokens, C classes, V ids.
"""

import difflib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from engrammar.addressing import hash_ngrams, look_back
from engrammar.config import check_setting
from engrammar.edit.exact import distinct_rows
from engrammar.edit.patch import addressing_digest, classes_digest
from engrammar.memory import Memory
from engrammar.tables.sealed import written_beside
from engrammar.train.documents import read_documents

FORMAT = "engrammar census 1"
BATCH_TOKENS = 1 << 16  # counted at once
MOST_NAMED = 1000  # n-grams of one row that are read and compared
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CensusSettings:
    """What a census keeps."""

    # Of each order. Where a corpus has more, rare ones are forgotten on the way, and the census says so: counts are
    # then at least what they say, and an n-gram that is missing may occur.
    most_ngrams: int = 1_000_000
    most_tokens: int | None = None  # tokens of the corpus that are read; None is all

    def __post_init__(self) -> None:
        for name in ("most_ngrams", "most_tokens"):
            value = getattr(self, name)
            check_setting(name, value, value is None or value >= 1, "1 or more")


@final
class Counted:
    """The n-grams of one order so far. The memory that it takes is bounded by twice `most`."""

    def __init__(self, order: int, most: int) -> None:
        self.most = most
        self.forgotten = 0  # n-grams that were dropped, each with its count so far
        self.classes_GN, self.counts_G = np.empty((0, order), np.int32), np.empty(0, np.int64)

    def add(self, ngrams_TN: NDArray[np.int32]) -> None:
        """Counts n-grams, repeats included."""
        both = np.concatenate([self.classes_GN, ngrams_TN])
        first, kind = distinct_rows(both)
        weights = np.concatenate([self.counts_G, np.ones(len(ngrams_TN), np.int64)])
        self.classes_GN = both[first]
        self.counts_G = np.bincount(kind, weights, minlength=len(first)).astype(np.int64)
        if len(self.counts_G) > 2 * self.most:
            self.keep_most()

    def keep_most(self) -> None:
        """Forgets all but the `most` most frequent n-grams."""
        if len(self.counts_G) <= self.most:
            return
        kept = np.sort(np.argsort(-self.counts_G, kind="stable")[: self.most])
        self.forgotten += len(self.counts_G) - len(kept)
        self.classes_GN, self.counts_G = self.classes_GN[kept], self.counts_G[kept]


def build_census(
    memory: Memory,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    out: Path,
    settings: CensusSettings = CensusSettings(),
) -> dict[str, Any]:
    """Counts the n-grams of a corpus and writes which of them share rows of a memory. Shows a progress bar.

    N-grams that begin before a document are left out.

    Args:
        corpus: a file or folder of text, or pocket:NAME (`train.documents.read_documents`).
        out: the file.

    Returns:
        What the file says of itself: "corpus", "tokens", "forgotten" n-grams by order, and digests.

    Raises:
        ValueError: the corpus cannot be read or holds no n-gram.
    """
    counted = {order: Counted(order, settings.most_ngrams) for order in memory.config.orders}
    num_tokens = 0
    with tqdm(desc=f"counting {corpus}", unit="token", total=settings.most_tokens, delay=2, leave=False) as bar:
        for documents in _batches(tokenizer, corpus, settings.most_tokens):
            for order, ngrams_TN in _ngrams(memory, documents).items():
                counted[order].add(ngrams_TN)
            num_read = sum(map(len, documents))
            num_tokens += num_read
            bar.update(num_read)
    for one in counted.values():
        one.keep_most()
    if not any(len(one.counts_G) for one in counted.values()):
        raise ValueError(f"{corpus} has no n-gram: give a text of a few words at least.")
    about = {
        "format": FORMAT,
        "corpus": corpus,
        "tokens": num_tokens,
        "forgotten": {str(order): one.forgotten for order, one in counted.items()},
        "addressing_sha256": addressing_digest(memory.config, memory.geometry),
        "classes_sha256": classes_digest(_classes(memory)),
    }
    arrays: dict[str, NDArray[Any]] = {"ids": _id_of_class(memory)}
    for order, one in counted.items():
        arrays |= {f"classes.{order}": one.classes_GN, f"counts.{order}": one.counts_G}
    for layer in memory.config.layers:
        for column in range(memory.config.num_columns):
            order = memory.config.orders[column // memory.config.num_heads]
            rows_G = rows_of(memory, layer, column, counted[order].classes_GN)
            arrays[f"sorted.{layer}.{column}"] = np.argsort(rows_G, kind="stable").astype(np.int32)
    with written_beside(out) as partial:
        save_file(arrays, partial, metadata={"engrammar_census": json.dumps(about)})
    return about


def _batches(
    tokenizer: PreTrainedTokenizerBase, corpus: str, most_tokens: int | None
) -> Iterator[list[NDArray[np.int64]]]:
    """Documents as ids, some BATCH_TOKENS at a time; long ones are cut."""
    batch: list[NDArray[np.int64]] = []
    left = most_tokens
    for text in read_documents(corpus, cache=Path("data/pocket")):
        ids_T = np.array(tokenizer(text, verbose=False).input_ids[:left], np.int64)
        for start in range(0, len(ids_T), BATCH_TOKENS):
            batch.append(ids_T[start : start + BATCH_TOKENS])
            if sum(map(len, batch)) >= BATCH_TOKENS:
                yield batch
                batch = []
        if left is not None:
            left -= len(ids_T)
            if left <= 0:
                break
    yield batch


def _ngrams(memory: Memory, documents: Iterable[NDArray[np.int64]]) -> dict[int, NDArray[np.int32]]:
    """The classes [T, N] of all n-grams that lie in documents whole, by their order."""
    parts = [document for document in documents if len(document)]
    if not parts:
        return {}
    ids_BT = torch.from_numpy(np.concatenate(parts))[None]
    starts = np.zeros(ids_BT.shape[1], bool)
    starts[np.cumsum([0, *map(len, parts[:-1])])] = True
    starts_BT = torch.from_numpy(starts)[None]
    config, geometry = memory.config, memory.geometry
    classes_V = torch.from_numpy(_classes(memory))
    # Without a class for missing history, that can be told from any class.
    seen = look_back(
        ids_BT, config=config, geometry=replace(geometry, fill_class=-1), classes_V=classes_V, starts_BT=starts_BT
    )
    seen_NT = torch.stack(seen)[:, 0].numpy()
    found = {}
    for order in config.orders:
        ngrams_TN = seen_NT[:order][::-1].T
        found[order] = np.ascontiguousarray(ngrams_TN[(ngrams_TN >= 0).all(1)]).astype(np.int32)
    return found


def _classes(memory: Memory) -> NDArray[np.int64]:
    """The class of each id."""
    if memory.class_of_id is None:
        return np.arange(memory.geometry.num_classes)
    return memory.class_of_id.cpu().numpy()


def _id_of_class(memory: Memory) -> NDArray[np.int32]:
    """The first id of each class."""
    classes_V = _classes(memory)[: memory.num_ids]
    first = np.zeros(memory.geometry.num_classes, np.int32)
    first[classes_V[::-1]] = np.arange(len(classes_V) - 1, -1, -1)
    return first


def rows_of(memory: Memory, layer: int, column: int, ngrams_GN: NDArray[np.int32]) -> Ints:
    """The row [G] that each n-gram reads in one column of a layer's table."""
    config, index = memory.config, memory.config.layers.index(layer)
    order = ngrams_GN.shape[1]
    classes = torch.from_numpy(np.ascontiguousarray(ngrams_GN[:, ::-1].T).astype(np.int64))
    looked_back = [classes[back][None] if back < order else classes[0][None] for back in range(config.max_ngram_size)]
    rows_BTH = hash_ngrams(looked_back, config=config, geometry=memory.geometry, layer_index=index)
    return rows_BTH[0, :, column].numpy()


@final
class Census:
    """A census file and the memory that it is of. Only what is asked for is read.

    Raises:
        ValueError: the file is none, or is of another memory.
    """

    def __init__(self, path: Path, memory: Memory, tokenizer: PreTrainedTokenizerBase) -> None:
        self.memory, self.tokenizer, self.path = memory, tokenizer, path
        try:
            self._file = safe_open(path, framework="numpy")
            self.about = json.loads((self._file.metadata() or {})["engrammar_census"])
            is_census = self.about["format"] == FORMAT
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is no census ({error}): make one with engrammar explore census.") from error
        wanted = addressing_digest(memory.config, memory.geometry), classes_digest(_classes(memory))
        if not is_census or wanted != (self.about["addressing_sha256"], self.about["classes_sha256"]):
            raise ValueError(f"{path} is a census of another memory: its rows are not this model's; make one for it.")
        self._classes_V = _classes(memory)
        self._ids_C = self._file.get_tensor("ids")

    def classes_of(self, ids: Iterable[int]) -> tuple[int, ...]:
        """The classes of ids."""
        return tuple(int(self._classes_V[one]) for one in ids)

    def name_of(self, classes: Iterable[int]) -> str:
        """An n-gram in words: an id of each class, decoded."""
        return self.tokenizer.decode([int(self._ids_C[one]) for one in classes])

    def count(self, classes: tuple[int, ...]) -> int:
        """How often the corpus has an n-gram, as far as the census knows."""
        ngrams = self._file.get_slice(f"classes.{len(classes)}")

        def ngram_at(place: int) -> bytes:
            return ngrams[place : place + 1].tobytes()

        wanted, num = np.array(classes, np.int32).tobytes(), ngrams.get_shape()[0]
        place = bisect_left(range(num), wanted, key=ngram_at)  # in the order of `distinct_rows`, that of the bytes
        if place == num or ngram_at(place) != wanted:
            return 0
        return int(self._file.get_slice(f"counts.{len(classes)}")[place : place + 1][0])

    def sharing(self, layer: int, column: int, classes: tuple[int, ...], most: int = 5) -> dict[str, Any]:
        """The other n-grams of the corpus that read the row of an n-gram in one column.

        Returns:
            "num", how many there are; "often" and "near", up to `most` each of the first MOST_NAMED: the most frequent
            ones, and those whose name is most like the n-gram's, as "text" and "count".
        """
        order = len(classes)
        sorted_G = self._file.get_slice(f"sorted.{layer}.{column}")
        ngrams = self._file.get_slice(f"classes.{order}")

        def row_at(place: int) -> int:
            number = int(sorted_G[place : place + 1][0])
            return int(rows_of(self.memory, layer, column, ngrams[number : number + 1])[0])

        wanted = int(rows_of(self.memory, layer, column, np.array([classes], np.int32))[0])
        places = range(sorted_G.get_shape()[0])
        first, last = (bisect_left(places, row, key=row_at) for row in (wanted, wanted + 1))
        numbers = sorted_G[first : min(last, first + MOST_NAMED)].tolist() if last > first else []
        named, own = self._named(order, numbers, classes), self.name_of(classes).lower()

        def unlikeness(one: dict[str, Any]) -> float:
            return -difflib.SequenceMatcher(None, own, one["text"].lower()).ratio()

        return {
            "num": last - first - (self.count(classes) > 0),
            "often": sorted(named, key=lambda one: -one["count"])[:most],
            "near": sorted(named, key=unlikeness)[:most],
        }

    def _named(self, order: int, numbers: list[int], without: tuple[int, ...]) -> list[dict[str, Any]]:
        ngrams, counts = self._file.get_slice(f"classes.{order}"), self._file.get_slice(f"counts.{order}")
        found = []
        for number in numbers:
            classes = tuple(int(one) for one in ngrams[number : number + 1][0])
            if classes != without:
                found.append({"text": self.name_of(classes), "count": int(counts[number : number + 1][0])})
        return found
