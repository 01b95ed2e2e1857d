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

from engrammar.stores.base import Fetch, RowStore
from engrammar.stores.cache import CachedStore
from engrammar.stores.disk import DiskStore
from engrammar.stores.ram import RamStore
from engrammar.stores.serving import StoredTables
from engrammar.table import MemoryTable
from engrammar_explore.watching import Place, places_of

TIERS = ((RamStore, "RAM"), (DiskStore, "disk"))


@dataclass(kw_only=True)
class Meter:
    """One table, and what was read of it since the last `Traffic.take`."""

    name: str  # the memory's
    layer: int
    tier: str = "another source"
    cache: CachedStore | None = None
    rows: int = 0
    seconds: float = 0.0  # that the pass waited
    before: tuple[int, int] = (0, 0)  # hits and misses of the cache until then


@final
class TimedStore(RowStore):
    """A store whose rows are counted and whose reads are timed; what it returns is the inner store's."""

    def __init__(self, store: RowStore, meter: Meter) -> None:
        self.store, self.meter = store, meter
        self.name, self.identity = store.name, store.identity
        self.num_rows, self.row_bytes = store.num_rows, store.row_bytes

    def _fetch(self, rows_U: NDArray[np.int64]) -> Fetch:
        started = time.perf_counter()
        fetch = self.store.fetch(rows_U)
        self.meter.rows += len(rows_U)
        self.meter.seconds += time.perf_counter() - started
        return _TimedFetch(fetch, self.meter)

    def close(self) -> None:
        self.store.close()


@final
class _TimedFetch(Fetch):
    def __init__(self, fetch: Fetch, meter: Meter) -> None:
        self.fetch, self.meter = fetch, meter

    def wait(self, seconds: float | None = None) -> NDArray[np.uint8]:
        started = time.perf_counter()
        try:
            return self.fetch.wait(seconds)
        finally:
            self.meter.seconds += time.perf_counter() - started


@final
class Traffic:
    """Counts and times the reads of all tables of a model, until it is closed."""

    def __init__(self, model: nn.Module) -> None:
        self._undo = ExitStack()
        self._meters = [_metered(place, self._undo) for place in places_of(model)]
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
        for meter in self._meters:
            told: dict[str, Any] = {"name": meter.name, "layer": meter.layer, "tier": meter.tier, "rows": meter.rows}
            told["microseconds"] = 1e6 * meter.seconds
            if meter.cache is not None:
                now = meter.cache.hits, meter.cache.misses
                told |= {"hits": now[0] - meter.before[0], "misses": now[1] - meter.before[1]}
                meter.before = now
            meter.rows, meter.seconds = 0, 0.0
            found.append(told)
        return found


def _metered(place: Place, undo: ExitStack) -> Meter:
    """Counts the reads of one table."""
    meter = Meter(name=place.name, layer=place.layer)
    table, source = place.memory.table(place.layer), place.memory.source
    if isinstance(source, StoredTables):
        store = source.stores[table.name]
        meter.cache = store if isinstance(store, CachedStore) else None
        source.stores[table.name] = timed = TimedStore(store, meter)
        undo.callback(_put_back, source.stores, table.name, timed)
        below = store if meter.cache is None else meter.cache._store
        tier = next((name for kind, name in TIERS if isinstance(below, kind)), type(below).__name__)
        meter.tier = tier if meter.cache is None else f"cache in front of {tier}"
    elif table.weight is not None:
        _time_parameter(table, meter, undo)
        meter.tier = "weights of the model"
    return meter


def _put_back(stores: dict[str, RowStore], name: str, timed: TimedStore) -> None:
    if stores[name] is timed:  # else a patch's rows are in front of it, and it only counts
        stores[name] = timed.store


def _time_parameter(table: MemoryTable, meter: Meter, undo: ExitStack) -> None:
    started: list[float] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        started.append(time.perf_counter())

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        meter.rows += args[0].numel()
        meter.seconds += time.perf_counter() - started.pop()

    undo.callback(table.register_forward_pre_hook(before).remove)
    undo.callback(table.register_forward_hook(after).remove)
