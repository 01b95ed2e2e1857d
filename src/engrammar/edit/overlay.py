"""Row deltas on a running model: an overlay in front of a table's store, or of its parameter. Neither is changed.

Letters: B batch, T tokens, H columns, C row width, E = H*C, U replaced rows, N rows asked for, S bytes of a stored row.
"""

import copy
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engrammar.config import Encoding
from engrammar.edit.patch import Patch, RowDelta, Tables, addressing_digest, row_digests
from engrammar.memory import Memory
from engrammar.stores.base import Fetch, RowsMissing, RowStore
from engrammar.stores.serving import StoredTables
from engrammar.table import MemoryTable
from engrammar.tables.encodings import FLOATS, decode, encode

PARAMETERS = {dtype: encoding for encoding, dtype in FLOATS.items()}


@final
class OverlayStore(RowStore):
    """A store some of whose rows are replaced. Closing it closes the store below."""

    def __init__(self, store: RowStore, delta: RowDelta) -> None:
        self.store, self.delta = store, delta
        self.name, self.num_rows, self.row_bytes = store.name, store.num_rows, store.row_bytes
        sums = row_digests(np.frombuffer(delta.rows_U.tobytes() + delta.stored_US.tobytes(), np.uint8)[None])
        self.identity = f"{store.identity} under rows {sums[0]:016x}"

    def _fetch(self, rows_N: NDArray[np.int64]) -> Fetch:
        return _Replaced(self.store.fetch(rows_N), self.delta, rows_N)

    def _detach(self) -> None:
        self.store = copy.deepcopy(self.store)

    def close(self) -> None:
        self.store.close()


@final
class _Replaced(Fetch):
    """A fetch whose rows are then replaced where a delta has them; such a row is not missing."""

    def __init__(self, fetch: Fetch, delta: RowDelta, rows_N: NDArray[np.int64]) -> None:
        self.fetch, self.delta = fetch, delta
        at_N = np.minimum(np.searchsorted(delta.rows_U, rows_N), len(delta.rows_U) - 1)
        self.is_replaced_N = delta.rows_U[at_N] == rows_N
        self.at = at_N[self.is_replaced_N]

    def wait(self, seconds: float | None = None) -> NDArray[np.uint8]:
        try:
            rows_NS = self.fetch.wait(seconds)
        except RowsMissing as error:
            missing_N = error.missing_U & ~self.is_replaced_N
            error.rows_US[self.is_replaced_N] = self.delta.stored_US[self.at]
            if missing_N.any():
                raise RowsMissing(str(error), missing_N, error.rows_US) from error
            return error.rows_US
        rows_NS[self.is_replaced_N] = self.delta.stored_US[self.at]
        return rows_NS


def _below(source: StoredTables, table: MemoryTable) -> RowStore:
    """The store of a table, below its overlay if it has one."""
    store = source.stores[table.name]
    return store.store if isinstance(store, OverlayStore) else store


@final
class TableOverlay:
    """The overlay of one table of a model."""

    def __init__(self, table: MemoryTable) -> None:
        self.table = table
        self.handle: RemovableHandle | None = None

    def show(self, delta: RowDelta | None, encoding: Encoding | None = None) -> None:
        """Replaces these rows and no others; with None the table is as it was.

        Args:
            encoding: that of the rows in front of a parameter; None: as the parameter is now.
        """
        source = self.table.source
        if isinstance(source, StoredTables):
            below = _below(source, self.table)
            source.stores[self.table.name] = below if delta is None else OverlayStore(below, delta)
            return
        torch.compiler.reset()  # compiled code does not notice hooks that come or go
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        if delta is not None:
            self.handle = self.table.register_forward_hook(_Replacing(delta, self.table, encoding))


@final
class _Replacing:
    """A hook that replaces rows among those that a table of parameters has looked up."""

    def __init__(self, delta: RowDelta, table: MemoryTable, encoding: Encoding | None) -> None:
        weight_RC = table.weight
        assert weight_RC is not None
        encoding = PARAMETERS[weight_RC.dtype] if encoding is None else encoding
        self.rows_U = torch.from_numpy(delta.rows_U)
        self.values_UC = decode(torch.from_numpy(delta.stored_US), table.shape[1], encoding, weight_RC.dtype)

    def __call__(self, table: nn.Module, args: tuple[Any, ...], embedding_BTE: Tensor) -> Tensor:
        rows_BTH = args[0]
        rows_U = self.rows_U.to(rows_BTH.device)
        at_BTH = torch.searchsorted(rows_U, rows_BTH).clamp_max(len(rows_U) - 1)
        is_replaced_BTH = rows_U[at_BTH] == rows_BTH
        if not bool(is_replaced_BTH.any()):
            return embedding_BTE
        new_BTHC = self.values_UC.to(embedding_BTE)[at_BTH]  # which may have been cast since
        kept_BTHC = embedding_BTE.unflatten(-1, (rows_BTH.shape[-1], -1))
        return torch.where(is_replaced_BTH[..., None], new_BTHC, kept_BTHC).flatten(-2)


def tables_of(memory: Memory) -> Tables:
    """What row deltas of a memory are for.

    Raises:
        ValueError: its rows are where no overlay can be put.
    """
    config, source = memory.config, memory.source
    encodings: set[Encoding] = set()
    for layer in config.layers:
        table = memory.table(layer)
        if isinstance(source, StoredTables):
            encodings.add(source.files[table.name].encoding)
        elif source is None and table.weight is not None and tuple(table.weight.shape) == table.shape:
            if table.weight.dtype not in PARAMETERS:
                raise ValueError(f"The tables are {table.weight.dtype}; rows are replaced in fp32 or bf16 tables.")
            encodings.add(PARAMETERS[table.weight.dtype])
        else:
            raise ValueError(
                "The tables are placed for training, or spread over ranks: rows are replaced in a model that holds its "
                "tables, or whose tables are served."
            )
    (encoding,) = encodings
    return Tables(
        addressing_sha256=addressing_digest(config, memory.geometry),
        encoding=encoding,
        width=config.head_dim,
        num_rows={layer: memory.table(layer).shape[0] for layer in config.layers},
    )


def stored_rows(memory: Memory, layer: int, rows_U: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The rows of a layer's table as they are stored, overlays not counted, [U, S]."""
    table, source = memory.table(layer), memory.source
    if isinstance(source, StoredTables):
        return _below(source, table).fetch(rows_U).wait()
    assert table.weight is not None
    values_UC = table.weight.detach()[torch.from_numpy(rows_U).to(table.weight.device)].cpu().contiguous()
    return values_UC.view(torch.uint8).numpy().reshape(len(rows_U), -1)


def scale_of(memory: Memory, layer: int) -> float | None:
    """What the values of a layer's whole table are multiplied by as they are stored; None without a scale."""
    source = memory.source
    return source.files[memory.table(layer).name].scale if isinstance(source, StoredTables) else None


def replace_rows(memory: Memory, new: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tables, dict[int, RowDelta]]:
    """Row deltas that replace rows of a memory, for `build_patch`.

    Args:
        new: for each layer, row numbers [U] (distinct) and their new values [U, C], which are stored as the table is.

    Raises:
        ValueError: values have another shape or are not finite, or a row is not in the table.
    """
    tables, deltas = tables_of(memory), {}
    for layer, (rows, values_UC) in new.items():
        order = rows.argsort()
        rows_U = rows[order].cpu().numpy().astype(np.int64)
        if values_UC.shape != (len(rows_U), tables.width) or not bool(values_UC.isfinite().all()):
            raise ValueError(f"New rows are {list(values_UC.shape)}; allowed: [{len(rows_U)}, {tables.width}], finite.")
        if len(rows_U) and not 0 <= rows_U[0] <= rows_U[-1] < tables.num_rows[layer]:
            raise ValueError(f"A row is not one of the {tables.num_rows[layer]} rows of layer {layer}.")
        deltas[layer] = RowDelta(
            rows_U=rows_U,
            stored_US=encode(values_UC[order].cpu(), tables.encoding, scale_of(memory, layer)).numpy(),
            replaced_U=row_digests(stored_rows(memory, layer, rows_U)),
        )
    return tables, deltas


def check_tables(patch: Patch, memory: Memory) -> None:
    """Checks that the row deltas of a patch are for these tables, and replace the rows that are there.

    Raises:
        ValueError: names what differs.
    """
    require_tables(patch, tables_of(memory), "here")
    for layer, delta in patch.deltas.items():
        check_replaced(patch.name, layer, delta, stored_rows(memory, layer, delta.rows_U))


def require_tables(patch: Patch, found: Tables, where: str) -> None:
    """Raises a ValueError that names the first thing in which tables are not those that row deltas are for."""
    for what in ("addressing_sha256", "width", "num_rows", "encoding"):
        there, ours = getattr(patch.tables, what), getattr(found, what)
        if there != ours:
            raise ValueError(
                f"The patch {patch.name!r} replaces rows of tables with another {what} ({there} there, {ours} {where}"
                "): make it for these tables."
            )


def check_replaced(name: str, layer: int, delta: RowDelta, stored_US: NDArray[np.uint8]) -> None:
    """Raises a ValueError if a row is neither the one that a delta replaces."""
    differs = row_digests(stored_US) != delta.replaced_U
    if differs.any():
        raise ValueError(
            f"Row {delta.rows_U[differs][0]} of layer {layer} is not the one that the patch {name!r} replaces "
            f"({int(differs.sum())} of {len(differs)} differ): undo what has changed it, or make the patch anew."
        )
