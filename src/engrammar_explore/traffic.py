"""Where rows come from and how long they take: per memory layer the tier, rows, cache hits and microseconds.

Letters: U rows asked for, S bytes of a stored row.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from engrammar.memory import Memory
from engrammar.stores.base import Fetch, RowStore
from engrammar.stores.cache import CachedStore
from engrammar.stores.disk import DiskStore
from engrammar.stores.ram import RamStore
from engrammar.stores.serving import StoredTables
from engrammar.table import MemoryTable
from engrammar_explore.watching import places_of

TIERS = ((RamStore, "RAM"), (DiskStore, "disk"))


@dataclass(kw_only=True)
class Flow:
    """What was read of one table since the last `Traffic.take`; seconds are those that the pass waited."""

    rows: int = 0
    seconds: float = 0.0


@final
class TimedStore(RowStore):
    """A store whose rows are counted and whose reads are timed; what it returns is the inner store's."""

    def __init__(self, store: RowStore, flow: Flow) -> None:
        self.store, self.flow = store, flow
        self.name, self.identity = store.name, store.identity
        self.num_rows, self.row_bytes = store.num_rows, store.row_bytes

    def _fetch(self, rows_U: NDArray[np.int64]) -> Fetch:
        started = time.perf_counter()
        fetch = self.store.fetch(rows_U)
        self.flow.rows += len(rows_U)
        self.flow.seconds += time.perf_counter() - started
        return _TimedFetch(fetch, self.flow)

    def close(self) -> None:
        self.store.close()


@final
class _TimedFetch(Fetch):
    def __init__(self, fetch: Fetch, flow: Flow) -> None:
        self.fetch, self.flow = fetch, flow

    def wait(self, seconds: float | None = None) -> NDArray[np.uint8]:
        started = time.perf_counter()
        try:
            return self.fetch.wait(seconds)
        finally:
            self.flow.seconds += time.perf_counter() - started


@final
class Traffic:
    """Counts and times the reads of all tables of a model, until it is closed."""

    def __init__(self, model: nn.Module) -> None:
        self._undo = ExitStack()
        self._meters: list[tuple[str, int, str, Flow, CachedStore | None]] = []
        self._before: dict[int, tuple[int, int]] = {}
        seen: set[tuple[int, int]] = set()
        for place in places_of(model):
            if (id(place.memory), place.layer) in seen:
                continue
            seen.add((id(place.memory), place.layer))
            flow = Flow()
            tier, cache = _meter(place.memory, place.layer, flow, self._undo)
            self._meters.append((place.name, place.layer, tier, flow, cache))
        self.take()

    def close(self) -> None:
        """Leaves the model as it was."""
        self._undo.close()

    def take(self) -> list[dict[str, Any]]:
        """What was read since the last call.

        Returns:
            for each memory layer "name", "layer", "tier", "rows", "microseconds", and with a cache "hits" and "misses".
        """
        found = []
        for index, (name, layer, tier, flow, cache) in enumerate(self._meters):
            told: dict[str, Any] = {"name": name, "layer": layer, "tier": tier, "rows": flow.rows}
            told["microseconds"] = 1e6 * flow.seconds
            if cache is not None:
                now = cache.hits, cache.misses
                before = self._before.get(index, (0, 0))
                told |= {"hits": now[0] - before[0], "misses": now[1] - before[1]}
                self._before[index] = now
            flow.rows, flow.seconds = 0, 0.0
            found.append(told)
        return found


def _meter(memory: Memory, layer: int, flow: Flow, undo: ExitStack) -> tuple[str, CachedStore | None]:
    """Counts the reads of one table; returns the name of its tier, and its cache."""
    table, source = memory.table(layer), memory.source
    if isinstance(source, StoredTables):
        store = source.stores[table.name]
        cache = store if isinstance(store, CachedStore) else None
        source.stores[table.name] = timed = TimedStore(store, flow)
        undo.callback(_put_back, source.stores, table.name, timed)
        below = store if cache is None else cache._store
        tier = next((name for kind, name in TIERS if isinstance(below, kind)), type(below).__name__)
        return tier if cache is None else f"cache in front of {tier}", cache
    if table.weight is not None:
        _time_parameter(table, flow, undo)
        return "weights of the model", None
    return "another source", None


def _put_back(stores: dict[str, RowStore], name: str, timed: TimedStore) -> None:
    if stores[name] is timed:  # else a patch's rows are in front of it, and it only counts
        stores[name] = timed.store


def _time_parameter(table: MemoryTable, flow: Flow, undo: ExitStack) -> None:
    started: list[float] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        started.append(time.perf_counter())

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        flow.rows += args[0].numel()
        flow.seconds += time.perf_counter() - started.pop()

    undo.callback(table.register_forward_pre_hook(before).remove)
    undo.callback(table.register_forward_hook(after).remove)
