"""Decoding with tables on disk against tables in RAM: same model, same real text, same steps.

In each round, one backbone with random weights takes its rows from every variant in turn. The text is fed token by
token and nothing is sampled, so all variants read the same rows. "Cold" has no cache: every row is read from the disk,
bypassing the page cache. What a step moves is the stored bytes of its rows; it stands still while it asks for them and
while it waits for them, and what prefetching takes off that time is hidden.
"""

import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from engrammar.cells import Column
from engrammar.config import MemoryConfig
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.stores.base import Arrived, Fetch, RowStore
from engrammar.stores.cache import CachedStore
from engrammar.stores.disk import DiskStore
from engrammar.stores.ram import RamStore
from engrammar.stores.serving import ServingSettings, StoredTables, serve_tables
from engrammar.table import Rows, RowSource
from engrammar.tables.folder import TableFile, TableWriter, open_tables
from engrammar.train.documents import read_documents
from engrammar_lab.bench.figures import by_variant, line_by_line
from engrammar_lab.bench.files import bench_folder
from engrammar_lab.bench.models import random_model, with_rows
from engrammar_lab.bench.turns import ratio, seconds_of, wait_for

COLD, COLD_LATE, RAM = "disk, cold", "disk, cold, no prefetch", "RAM"
WARM, WARM_LATE = "disk, warm cache", "disk, warm cache, no prefetch"
VARIANTS = (COLD, COLD_LATE, RAM, WARM, WARM_LATE)  # cold ones first, before another variant has read the round's rows
COLUMNS = (
    Column("batch", "batch"),
    Column("rows", "name"),
    Column("tokens/s", "tokens_per_second", ",.1f"),
    Column("step ms", "step_ms", ".2f"),
    Column("of RAM", "share", ".1%"),
    Column("cache misses", "misses"),
    Column("KB a step", "step_kb", ",.0f"),
    Column("still ms", "still_ms", ".3f"),
    Column("hidden", "hidden", ".0%"),
)
NONE = {"misses": None, "hidden": None}
table = line_by_line(COLUMNS, lambda result: [{**NONE, **line} for line in by_variant(result["batches"])])
LATE = {COLD: COLD_LATE, WARM: WARM_LATE}
PROMPT = 32
BLOCK_ROWS = 1 << 16  # rows written at once


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run measures."""

    preset: str  # the preset of the backbone, and of the memory except its number of rows
    rows_per_head: int  # rows per head of each order
    batches: tuple[int, ...]  # batch sizes
    rounds: int  # number of rounds; in each, every variant decodes `steps` tokens of new text
    steps: int
    corpus: str  # the pocket corpus that the text is from
    device: str = "cpu"  # where the model is; its rows are on the host or on disk in any case


FULL = Plan(preset="100m", rows_per_head=8_400_000, batches=(1, 16), rounds=5, steps=24, corpus="pocket:wiki")
QUICK = Plan(preset="nano", rows_per_head=60_000, batches=(1, 4), rounds=2, steps=8, corpus="pocket:stdlib")


def config_of(plan: Plan) -> EngrammarConfig:
    return with_rows(plan.preset, plan.rows_per_head, row_encoding="bf16")


def make_tables(config: EngrammarConfig, folder: Path) -> None:
    """Tables of random bf16 rows in `folder`, unless they are there from an earlier run."""
    memory, geometry = config.memory_config, config.memory_geometry
    assert memory is not None
    if folder.exists():
        if open_tables(folder).geometry != geometry:
            raise ValueError(f"{folder} holds other tables: delete it.")
        return
    block = torch.empty(BLOCK_ROWS, memory.head_dim).normal_(0, 0.02).to(torch.bfloat16)
    with TableWriter(
        folder, memory=memory, geometry=geometry, encoding="bf16", source="engrammar bench decode"
    ) as writer:
        for index, layer in enumerate(memory.layers):
            for first in range(0, geometry.num_stored_rows(index), BLOCK_ROWS):
                rows = min(BLOCK_ROWS, geometry.num_stored_rows(index) - first)
                writer.write(layer, block.roll(first // BLOCK_ROWS, 0)[:rows].view(torch.uint8))


def sizes_of(folder: Path) -> tuple[int, int]:
    """Bytes of the rows of a folder's tables, and a tenth of the rows of the smallest one."""
    tables = open_tables(folder).tables.values()
    return sum(one.num_rows * one.row_bytes for one in tables), min(one.num_rows for one in tables) // 10


def read_text(plan: Plan, vocab_size: int) -> Tensor:
    """Ids of real text: as many as the run needs, or all. A word's id is its CRC-32 modulo the vocabulary size."""
    wanted = (plan.rounds + 1) * (PROMPT + plan.steps) * sum(plan.batches)
    ids: list[int] = []
    for text in read_documents(plan.corpus, cache=Path("data/pocket")):
        ids += [2 + zlib.crc32(word.encode()) % (vocab_size - 2) for word in re.findall(r"\w+|[^\w\s]", text)]
        if len(ids) >= wanted:
            break
    return torch.tensor(ids)


class Texts:
    """Real text as ids, handed out piece by piece, none twice."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.next = ids, 0

    def take(self, batch: int, length: int) -> Tensor:
        """ids [batch, length] that were not handed out before.

        Raises:
            ValueError: the text is used up.
        """
        first, self.next = self.next, self.next + batch * length
        if self.next > len(self.ids):
            raise ValueError(f"The corpus has {len(self.ids)} tokens; this run needs more: name a longer one.")
        return self.ids[first : self.next].view(batch, length)


@final
class Timed(RowSource):
    """Counts the bytes of the rows that are read, and the seconds for which the passes that read them stand still."""

    def __init__(self, source: StoredTables) -> None:
        self.source, self.tables = source, source.tables
        self.num_bytes, self.seconds = 0, 0.0

    def read(self, passes: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Callable[[], Rows]]]:
        started = time.perf_counter()
        reads = self.source.read(passes)
        self.seconds += time.perf_counter() - started
        stores = self.source.stores
        self.num_bytes += sum(rows.numel() * stores[name].row_bytes for one in passes for name, rows in one.items())
        return [{name: partial(self._wait, wait) for name, wait in read.items()} for read in reads]

    def _wait(self, wait: Callable[[], Rows]) -> Rows:
        started = time.perf_counter()
        rows = wait()
        self.seconds += time.perf_counter() - started
        return rows

    def save(self, directory: Path) -> None:
        self.source.save(directory)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What the steps after a prompt took."""

    seconds: float  # the median step
    still: float  # seconds a step, asking and waiting for rows
    num_bytes: float  # a step


@torch.no_grad()
def _decode(model: EngrammarForCausalLM, source: StoredTables, ids_BT: Tensor) -> Steps:
    cache, timed = DynamicCache(config=model.config), Timed(source)
    _give(model, timed)

    def step(ids_BT: Tensor) -> None:
        model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        wait_for(ids_BT.device)

    step(ids_BT[:, :PROMPT])
    timed.num_bytes, timed.seconds = 0, 0.0
    tokens = ids_BT[:, PROMPT:].split(1, dim=1)
    seconds = median(seconds_of(step, token_B1) for token_B1 in tokens)
    return Steps(seconds=seconds, still=timed.seconds / len(tokens), num_bytes=timed.num_bytes / len(tokens))


@final
class Late(RowStore):
    """Waits for rows as soon as it is asked for them, so that nothing is read beside the computing."""

    def __init__(self, store: RowStore) -> None:
        self.store = store
        self.name, self.identity = store.name, store.identity
        self.num_rows, self.row_bytes = store.num_rows, store.row_bytes

    def _fetch(self, rows_U: NDArray[np.int64]) -> Fetch:
        return Arrived(self.store.fetch(rows_U).wait())

    def close(self) -> None:
        self.store.close()


def _serve(model: EngrammarForCausalLM, folder: Path, cache_rows: int) -> dict[str, StoredTables]:
    """The source of the model's rows by variant. Variants with a cache share one; those in RAM share one copy."""
    stores: dict[tuple[str, int], RowStore] = {}

    def open_store(kind: str, table: TableFile) -> RowStore:
        place = "RAM" if kind == RAM else "cache" if kind in (WARM, WARM_LATE) else "disk"
        if (place, table.layer) not in stores:
            store: RowStore = RamStore(table) if place == "RAM" else DiskStore(table)
            stores[place, table.layer] = CachedStore(store, cache_rows) if place == "cache" else store
        found = stores[place, table.layer]
        return Late(found) if kind in (COLD_LATE, WARM_LATE) else found

    how = {kind: ServingSettings(where=partial(open_store, kind)) for kind in VARIANTS}
    return {kind: serve_tables(model, folder, settings) for kind, settings in how.items()}


def _give(model: EngrammarForCausalLM, source: RowSource) -> None:
    memory = model.model.memory
    assert memory is not None
    for layer in memory.config.layers:
        table = memory.table(layer)
        table.move_to(source, table.name)


def _warm(model: EngrammarForCausalLM, source: StoredTables, ids_BT: Tensor) -> None:
    """Reads the rows of a text until all of them are in the cache."""
    memory = model.model.memory
    assert memory is not None
    for layer, rows in memory.addresses(ids_BT).items():
        store = source.caches()[memory.table(layer).name]
        for _ in range(8):
            store.reset_counts()
            store.fetch(rows.flatten().cpu().numpy()).wait()
            if not store.misses:
                break


def _rates(plan: Plan, model: EngrammarForCausalLM, sources: Mapping[str, StoredTables], texts: Texts) -> Iterator[Any]:
    """Per batch size: each variant's tokens/s (median over rounds), its share of RAM's, and its cache misses."""
    for batch in plan.batches:
        steps: dict[str, list[Steps]] = {kind: [] for kind in VARIANTS}
        misses: dict[str, int] = {}
        for turn in range(plan.rounds + 1):
            ids_BT = texts.take(batch, PROMPT + plan.steps).to(plan.device)
            cold = (COLD, COLD_LATE) if turn % 2 else (COLD_LATE, COLD)
            others = [kind for kind in VARIANTS if kind not in cold]
            for kind in (*cold, *others[turn % 3 :], *others[: turn % 3]):
                caches = sources[kind].caches().values()
                if caches:
                    _warm(model, sources[kind], ids_BT)
                took = _decode(model, sources[kind], ids_BT)
                if turn:  # the first round only warms up the model
                    steps[kind].append(took)
                if caches:
                    misses[kind] = misses.get(kind, 0) + sum(cache.misses for cache in caches)
        seconds = {kind: [one.seconds for one in own] for kind, own in steps.items()}
        still = {kind: [one.still for one in own] for kind, own in steps.items()}
        yield {
            "batch": batch,
            "variants": {
                kind: {
                    "tokens_per_second": batch / median(seconds[kind]),
                    "step_ms": 1e3 * median(seconds[kind]),
                    "share": ratio(seconds[RAM], seconds[kind]),
                    "step_kb": median(one.num_bytes for one in steps[kind]) / 1e3,
                    "still_ms": 1e3 * median(still[kind]),
                    **({"misses": misses[kind]} if kind in misses else {}),
                    **({"hidden": 1 - ratio(still[kind], still[late])} if (late := LATE.get(kind)) else {}),
                }
                for kind in VARIANTS
            },
        }


def bench_decode(quick: bool, plan: Plan | None = None) -> dict[str, Any]:
    """Decodes real text with the tables in RAM and on disk, cold and with a warm cache of 10 % of the rows.

    Returns:
        `batches`: per batch size and variant, tokens/s, step time and the share of RAM's tokens/s (medians of rounds).
    """
    plan = plan or (QUICK if quick else FULL)
    config = config_of(plan)
    memory = config.memory_config
    assert isinstance(memory, MemoryConfig)
    folder = bench_folder() / f"decode-{plan.preset}-{plan.rows_per_head}"
    make_tables(config, folder)
    ids = read_text(plan, config.vocab_size)
    model = random_model(config, "external").eval().to(plan.device)
    table_bytes, cache_rows = sizes_of(folder)
    sources = _serve(model, folder, cache_rows)
    batches = list(_rates(plan, model, sources, Texts(ids)))
    for source in sources.values():
        source.close()
    return {
        "shapes": f"{plan.preset} on {plan.device}, fp32, {len(memory.layers)} layers of {memory.num_columns} rows of "
        f"{memory.head_dim} bf16 a token, {table_bytes / 2**30:.2f} GiB of rows, {plan.rounds} rounds of {plan.steps} "
        f"tokens after {PROMPT} of prompt",
        "table_bytes": table_bytes,
        "batches": batches,
    }


def verdict(result: dict[str, Any]) -> str:
    """Compares the shares with the targets: 97 % warm, 90 % cold."""
    sentences = []
    for kind, target in ((WARM, 0.97), (COLD, 0.90)):
        shares = {part["batch"]: part["variants"][kind]["share"] for part in result["batches"]}
        without = {part["batch"]: part["variants"][LATE[kind]]["share"] for part in result["batches"]}
        met = "met" if min(shares.values()) >= target else "missed"
        each = ", ".join(
            f"{share:.1%} at batch {batch} ({without[batch]:.1%} without prefetch)" for batch, share in shares.items()
        )
        sentences.append(f"{kind}: {each}; the target of {target:.0%} is {met}.")
    if result["quick"]:
        sentences.append("Quick: a small table, which says little about a disk.")
    return " ".join(sentences)
