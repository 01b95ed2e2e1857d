"""Serves a model's rows from table files on any tier, read-only (`train.placement` is for training).

All layers' reads of a forward pass start before its first block. Each block with memory waits for its own rows.
Letters: B batch, T tokens, H columns, C row width, E = H*C, U = B*T*H rows, S bytes of a stored row.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor, nn

from engrammar.config import check_choice, check_setting
from engrammar.memory import Memory, memory_of
from engrammar.stores.base import Fetch, RowsMissing, RowStore
from engrammar.stores.cache import CachedStore
from engrammar.stores.disk import DiskStore
from engrammar.stores.ram import RamStore
from engrammar.stores.to_device import DeviceCopies, on_host
from engrammar.table import Rows, RowSource
from engrammar.tables.encodings import PLAIN, decode
from engrammar.tables.folder import TableFile, TableFolder, open_tables
from engrammar.tables.shards import HOT_ROWS, MEMORY, write_index

Tier = Literal["ram", "disk"]
OnMissing = Literal["error", "skip", "zeros"]
Sharing = Literal["none", "processes"]

HOST = "cpu"  # the type of the device that needs no copies

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """How a model's tables are served. `from_pretrained` takes each setting by its name, and `where` as `memory`.

    Attributes:
        where: "ram", "disk", or a function that opens the store of a table (for instance a remote one).
        cache_rows: rows of each table kept in RAM in front of its store; 0 is no cache. Half of them are pinned to the
            hottest rows if the folder lists those (`engrammar table plan` writes `memory.hot.safetensors`).
        on_missing: what happens if a row is not read within `deadline` seconds. "error": RowsMissing is raised; "skip":
            the position takes nothing from that layer's memory; "zeros": only that row is zero. The last two count the
            rows and warn.
        deadline: how long to wait for a layer's rows, in seconds; None waits as long as the store allows.
        sharing: "processes": all processes of one user that serve the same tables use one copy of the tables in RAM and
            one cache; the last one to close them frees them. "none": each process has its own.
    """

    where: Tier | Callable[[TableFile], RowStore]
    cache_rows: int = 0
    on_missing: OnMissing = "error"
    deadline: float | None = None
    sharing: Sharing = "none"

    def __post_init__(self) -> None:
        known = callable(self.where) or self.where in get_args(Tier)
        tiers = ", ".join(get_args(Tier))
        check_setting("memory", self.where, known, f"{tiers}, or a function that opens a table's store")
        check_setting("cache_rows", self.cache_rows, self.cache_rows >= 0, "0 (no cache) or more")
        check_choice("on_missing", self.on_missing, OnMissing)
        check_choice("sharing", self.sharing, Sharing)
        if self.on_missing != "error" and (self.deadline is None or self.deadline <= 0):
            raise ValueError(
                f"on_missing={self.on_missing!r} needs a deadline in seconds, over 0; it is {self.deadline}."
            )
        if self.sharing == "processes" and self.where != "ram" and not self.cache_rows:
            raise ValueError("sharing='processes' needs something to share: memory='ram', or cache_rows.")


@dataclass(kw_only=True)
class Counts:
    """Rows asked for and missing so far, and (layer, position) pairs whose gate was closed because a row was."""

    rows: int = 0
    missing_rows: int = 0
    closed: int = 0


@final
class StoredTables(RowSource):
    """Reads a model's rows from stores, one for each table; made by `serve_tables`."""

    def __init__(
        self, folder: TableFolder, stores: Mapping[str, RowStore], settings: ServingSettings, dtype: torch.dtype
    ) -> None:
        self.tables: dict[str, nn.Parameter] = {}  # empty, since nothing here is trained
        # stores: the store of each table, by the table's name in the model.
        self.folder, self.stores, self.dtype = folder, dict(stores), dtype
        self.files = {file.name: file for file in folder.tables.values()}
        self.on_missing, self.deadline = settings.on_missing, settings.deadline
        self.counts = Counts()  # rows read and missed so far
        self.copies: dict[torch.device, DeviceCopies] = {}  # by the device of the model's ids

    @torch.compiler.disable  # stores are not traced: a graph breaks here, and at each layer's wait
    def read(self, passes: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Callable[[], Rows]]]:
        """As `RowSource.read`."""
        numbers = iter(on_host([rows_BTH for one in passes for rows_BTH in one.values()]))
        return [{name: self._start(name, next(numbers), rows.device) for name, rows in one.items()} for one in passes]

    def _start(self, name: str, rows_BTH: Tensor, device: torch.device) -> Callable[[], Rows]:
        fetch = self.stores[name].fetch(rows_BTH.detach().numpy().reshape(-1))
        wait, decoded = partial(self._wait, rows_BTH, fetch), partial(self._decode, name, rows_BTH.shape)
        if device.type == HOST:
            return partial(_untraced, lambda: decoded(wait()))
        if device not in self.copies:
            self.copies[device] = DeviceCopies(device)
        return partial(_untraced, self.copies[device].start(wait, decoded))

    def _wait(self, rows_BTH: Tensor, fetch: Fetch) -> tuple[Tensor, Tensor | None]:
        """Waits for rows; returns their bytes, and the positions that lack a row if those take nothing."""
        self.counts.rows += rows_BTH.numel()
        try:
            return torch.from_numpy(fetch.wait(self.deadline)), None
        except RowsMissing as error:
            if self.on_missing == "error":
                raise
            rows_US, missing_BT = error.rows_US, None
            rows_US[error.missing_U] = 0
            if self.on_missing == "skip":
                missing_BT = torch.from_numpy(error.missing_U).view(rows_BTH.shape).any(-1)
            self._count(error, 0 if missing_BT is None else int(missing_BT.sum()))
            return torch.from_numpy(rows_US), missing_BT

    def _decode(self, name: str, shape: torch.Size, read: tuple[Tensor, Tensor | None]) -> Rows:
        """The rows of a table for row numbers of a shape [B, T, H], from what `_wait` returned."""
        (rows_US, missing_BT), file = read, self.files[name]
        values_UC = decode(rows_US, file.width, file.encoding, self.dtype, file.scale)
        return Rows(values_UC.view(*shape[:-1], -1), missing_BT)

    def _count(self, error: RowsMissing, closed: int) -> None:
        """Counts missing rows; warns at the first one and whenever their number has doubled."""
        before, now = self.counts.missing_rows, self.counts.missing_rows + int(error.missing_U.sum())
        self.counts.missing_rows, self.counts.closed = now, self.counts.closed + closed
        if now.bit_length() > before.bit_length():
            done = "their gates closed" if self.on_missing == "skip" else "zeros in their place"
            logger.warning("%d of %d rows were missing so far, %s: %s", now, self.counts.rows, done, error)

    def caches(self) -> dict[str, CachedStore]:
        """The cache of each table that has one, under whatever stands in front of it."""
        found = {}
        for name, store in self.stores.items():
            below = getattr(store, "store", store)  # of a patch's overlay
            for one in (store, below):
                if isinstance(one, CachedStore):
                    found[name] = one
        return found

    def check_save(self, directory: Path) -> None:
        """As `RowSource.check_save`: the files that the rows are read from cannot be overwritten."""
        if directory.resolve() == self.folder.path.resolve():
            raise ValueError(f"The model's rows are read from {directory}: save it to another folder.")

    def save(self, directory: Path) -> None:
        """As `RowSource.save`: copies the files that the rows are read from."""
        shards = [shard for file in self.files.values() for shard in file.shards]
        paths = {path for shard in shards for path in (shard.path, shard.crc32) if path is not None}
        for path in (*sorted(paths), self.folder.path / MEMORY):
            shutil.copyfile(path, directory / path.name)
        whole = [file.name for file in self.files.values() if len(file.shards) == 1]
        if self.folder.encoding in PLAIN and len(whole) == len(self.files):
            write_index(directory, whole)

    def close(self) -> None:
        """Releases files, memory and connections."""
        for copies in self.copies.values():
            copies.close()
        for store in self.stores.values():
            store.close()


@torch.compiler.disable
def _untraced(wait: Callable[[], Rows]) -> Rows:
    return wait()


def serve_tables(
    model: nn.Module, folder: Path, settings: ServingSettings, dtype: torch.dtype | None = None
) -> StoredTables:
    """Gives a model that was built with tables="external" the rows of a table folder.

    Args:
        model: the model, whose tables are then read from stores.
        folder: a checkpoint or a folder of tables.
        settings: the stores and caches to open.
        dtype: what rows are decoded to; by default the dtype of the model's first weight.

    Raises:
        ValueError: the folder's tables are not this model's.
    """
    opened, memory = open_tables(folder), memory_of(model)
    if memory is None:
        raise ValueError(f"{type(model).__name__} has no memory: it cannot be given tables.")
    require_tables_of(memory, opened)
    stores: dict[str, RowStore] = {}
    hot = load_hot_rows(folder) if settings.cache_rows else {}
    try:
        for file in opened.tables.values():
            stores[file.name] = _open_store(file, settings)
            if settings.cache_rows:
                shared = settings.sharing == "processes"
                stores[file.name] = cache = CachedStore(stores[file.name], settings.cache_rows, shared=shared)
                if file.layer in hot:
                    _pin(cache, hot[file.layer][: settings.cache_rows // 2], folder)
    except BaseException:
        for store in stores.values():
            store.close()
        raise
    source = StoredTables(opened, stores, settings, dtype=dtype or next(model.parameters()).dtype)
    for layer, file in opened.tables.items():
        memory.table(layer).move_to(source, file.name)
    return source


def require_tables_of(memory: Memory, opened: TableFolder) -> None:
    """Raises a ValueError that names what differs, unless a folder's tables are addressed as `memory` does."""
    ours, theirs = memory.geometry, opened.geometry
    for what, found, wanted in (
        ("memory layers", sorted(opened.tables), sorted(memory.config.layers)),
        ("width of a row", opened.memory.head_dim, memory.config.head_dim),
        ("number of classes of ids", theirs.num_classes, ours.num_classes),
        ("class of missing history", theirs.fill_class, ours.fill_class),
        ("rows of each head", theirs.table_sizes, ours.table_sizes),
        ("multipliers of the hash", theirs.multipliers, ours.multipliers),
        ("rows_multiple", theirs.rows_multiple, ours.rows_multiple),
    ):
        if found != wanted:
            raise ValueError(
                f"The tables in {opened.path} are of another geometry than this model's ({what}: {found}, and "
                f"{wanted} in the model): give the model's own."
            )


def _open_store(file: TableFile, settings: ServingSettings) -> RowStore:
    if callable(settings.where):
        return settings.where(file)
    if settings.where == "ram":
        return RamStore(file, shared=settings.sharing == "processes")
    return DiskStore(file)


def stored_tables_of(model: nn.Module) -> StoredTables | None:
    """The stores that a model's rows are read from; None if its tables are not served."""
    memory = memory_of(model)
    return memory.source if memory is not None and isinstance(memory.source, StoredTables) else None


def look_ahead(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields batches for `model(**batch)`, each with `retrieved`; the next batch's rows are then being read already.

    This is for evaluation: the next batch's rows are read while this batch is computed. If the model's tables are not
    served from stores, or it cannot be given rows (a released model), the batches are yielded unchanged.
    """
    memory = memory_of(model)
    if memory is None or not isinstance(memory.source, StoredTables) or not hasattr(model, "retrieve"):
        yield from batches
        return
    before = None
    for batch in batches:
        masks = {key: batch.get(key) for key in ("attention_mask", "position_ids")}
        after = {**batch, "retrieved": memory.retrieve(batch["input_ids"], **masks)}
        if before is not None:
            yield before
        before = after
    if before is not None:
        yield before


def _pin(cache: CachedStore, rows_U: NDArray[np.int64], folder: Path) -> None:
    try:
        cache.pin(rows_U)
    except IndexError as error:
        raise ValueError(f"{folder / HOT_ROWS} is of other tables ({error}): delete it, or plan again.") from error


def load_hot_rows(folder: Path) -> dict[int, NDArray[np.int64]]:
    """For each layer, the most-read rows of some corpus, the hottest first; empty if the folder lists none.

    Raises:
        ValueError: the file with these rows is damaged.
    """
    path = folder / HOT_ROWS
    if not path.exists():
        return {}
    try:
        return {int(layer): rows.astype(np.int64) for layer, rows in load_file(path).items()}
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} does not hold rows to pin ({error}): delete it, or plan again.") from error
