"""Where a model's tables are while it trains: on the device, in RAM or in a mapped file; whole or sharded over ranks.

A placed table is not a parameter of its model, so whatever moves, wraps, shards or clips the model's parameters leaves
it alone. A read gathers the distinct rows of a batch once; their values are a leaf of the graph; after backward, the
leaf's gradient goes back to whoever holds the rows. Letters: U distinct rows, C row width, B, T, H as in `table`.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engrammar.table import Embedded, MemoryTable, RowSource, draw_rows_
from engrammar.tables.memory_json import finish_checkpoint
from engrammar.tables.shards import lay_out, read_rows, table_shard, write_index, write_rows
from engrammar.train.exchange import Group, Route, Traffic, all_sum, broadcast, own_rows
from engrammar.train.pages import zeros_in_file, zeros_in_ram
from engrammar.train.row_optimizers import RowBackend, RowOptimizer

Where = Literal["device", "ram", "file"]
Overlap = Literal["auto", "none", "exact", "stale"]


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Rows that have arrived: per table a leaf [U, C], fp32 at least, on the ids' device; and how they came."""

    leaves: dict[str, Tensor]
    route: Route | None


@dataclass(kw_only=True)
class Touched:
    """The distinct rows of one read, ascending, and their values once they are there."""

    rows: dict[str, Tensor]
    fetched: Future[Fetched]
    dtype: torch.dtype
    used: bool = False
    missing: list[Tensor] = field(default_factory=list)

    def look_up(self, name: str, rows: Tensor, checked: bool) -> Embedded:
        """The embedding [..., E] of stored rows [..., H]. `checked` notes whether any was not read."""
        leaf_UC = self.fetched.result().leaves[name]
        rows_U = self.rows[name]
        place = torch.searchsorted(rows_U, rows).clamp_(max=len(rows_U) - 1)
        if checked:
            self.missing.append((rows_U[place] != rows).any())
        return Embedded(nn.functional.embedding(place, leaf_UC).to(self.dtype).flatten(-2))


class TablePlacement(RowSource):
    """Holds tables outside their model while it trains; made by `place_tables`.

    Attributes:
        tables: this rank's rows of each table, a parameter whose `.grad` is sparse after `collect`.
        traffic: what was read and sent so far.
    """

    def __init__(
        self, modules: Mapping[str, MemoryTable], *, where: Where, folder: Path, group: Group | None, overlap: Overlap
    ) -> None:
        self.modules = dict(modules)
        self.where, self.folder, self.group = where, folder, group
        self.tables: dict[str, nn.Parameter] = {}
        self.stale = overlap == "stale"
        overlaps = overlap in ("exact", "stale") or (overlap == "auto" and torch.accelerator.is_available())
        self.worker = ThreadPoolExecutor(max_workers=1) if overlaps and where != "device" else None
        self.updates: list[Future[None]] = []
        self.open: list[Touched] = []  # read in this step, as forward passes went
        self.ahead: deque[Touched] = deque()  # read before their step: this one's, and the next one's if stale
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.traffic = Traffic()
        self.num_ranks = 1 if group is None else dist.get_world_size(group)
        self.is_first = group is None or dist.get_rank(group) == 0
        self.backend = RowBackend(
            allocate=self._allocate,
            submit=self._update,
            all_sum=partial(all_sum, group=group),
            is_sharded=self.num_ranks > 1,
        )

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.where == "file":
            return zeros_in_file(shape, dtype, self.folder)
        return zeros_in_ram(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)

    @torch.no_grad()
    def take(self, std: float, device: torch.device, dtype: torch.dtype, checkpoint: Path | None) -> None:
        """Takes the tables out of the model: rows of `checkpoint`, else the model's own, else newly drawn ones."""
        seeds = broadcast({name: table.init_seed for name, table in self.modules.items()}, self.group)
        home = device if self.where == "device" else torch.device("cpu")
        for name, table in self.modules.items():
            given = table.weight
            first, end = own_rows(table.shape[0], self.group)
            if checkpoint is None and given is not None and self._keeps(given, home):
                self.tables[name] = given
            else:
                own_UC = self._allocate((end - first, table.shape[1]), dtype if given is None else given.dtype, home)
                if checkpoint is not None:
                    read_rows(checkpoint / table_shard(name), f"{name}.weight", first, own_UC)
                elif given is not None:
                    own_UC.copy_(given[first:end])
                elif (seed := seeds[name]) is not None:
                    draw_rows_(own_UC, seed=seed, first_row=first, std=std)
                else:
                    raise ValueError(f"The rows of {name} are in the checkpoint that the model was read from: name it.")
                self.tables[name] = nn.Parameter(own_UC)
            table.weight, table.source, table.name = None, self, name
            self.hooks.append(table.register_load_state_dict_pre_hook(self._take_rows))

    @torch.no_grad()
    def _take_rows(self, table: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Before a table loads its state: this rank's rows of a whole table, where `state_dict` holds one."""
        whole_RC = state_dict.pop(prefix + "weight", None)
        if whole_RC is None:
            return
        assert isinstance(table, MemoryTable)
        if tuple(whole_RC.shape) != table.shape:
            raise ValueError(f"{prefix}weight has shape {list(whole_RC.shape)}; the table's is {list(table.shape)}.")
        self.flush()
        first, end = own_rows(table.shape[0], self.group)
        self.tables[table.name].copy_(whole_RC[first:end])

    def _keeps(self, given: Tensor, home: torch.device) -> bool:
        """Whether the model's own parameter is already where the rows shall be."""
        return self.num_ranks == 1 and self.where != "file" and given.device == home

    def release(self) -> bool:
        """Gives whole tables back to the model as its parameters. Tables in a file or over ranks stay: False."""
        self.flush()
        self.open.clear()
        self.ahead.clear()
        if self.where == "file" or self.num_ranks > 1:
            return False
        for hook in self.hooks:
            hook.remove()
        for name, table in self.modules.items():
            table.weight, table.source = self.tables[name], None
        return True

    @property
    def reads_ahead(self) -> bool:
        """Whether reading a step's rows together, before it, saves anything."""
        return self.where != "device" or self.num_ranks > 1

    # Reading

    def read(self, rows: Mapping[str, Tensor]) -> dict[str, Callable[[], Embedded]]:
        """As `RowSource.read`. While training, rows that were read ahead are not read again.

        With several ranks all of them must read together.
        """
        training = torch.is_grad_enabled() and any(self.tables[name].requires_grad for name in rows)
        if training and self.ahead:
            self.ahead[0].used = True
            return {name: partial(self.ahead[0].look_up, name, rows[name], True) for name in rows}
        touched = self._touch(rows, training)
        if training:
            self.open.append(touched)
        return {name: partial(touched.look_up, name, rows[name], False) for name in rows}

    def read_ahead(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Starts reading the rows of all forward passes of a step, each row once, before the first of them.

        The rows serve every training pass until `collect`. Called again before that, for the step after (stale).
        """
        together = {name: torch.cat([rows[name].flatten() for rows in batches]) for name in batches[0]}
        self.ahead.append(self._touch(together, training=True))

    def _touch(self, rows: Mapping[str, Tensor], training: bool) -> Touched:
        distinct = {name: rows_BTH.unique() for name, rows_BTH in rows.items()}
        self.traffic.num_looked_up += sum(rows_BTH.numel() for rows_BTH in rows.values())
        self.traffic.num_distinct += sum(len(rows_U) for rows_U in distinct.values())
        fetched = self._run(partial(self._fetch, distinct, training))
        return Touched(rows=distinct, fetched=fetched, dtype=next(iter(self.tables.values())).dtype)

    @torch.no_grad()
    def _fetch(self, rows: dict[str, Tensor], training: bool) -> Fetched:
        tables = [self.tables[name].detach() for name in rows]
        device = next(iter(rows.values())).device
        asked = [rows_U.to(tables[0].device) for rows_U in rows.values()]
        route = None
        if self.group is None:
            values = [table.index_select(0, rows_U) for table, rows_U in zip(tables, asked)]
        else:
            route = Route.ask(asked, [self.modules[name].shape[0] for name in rows], self.group, self.traffic)
            values = route.bring(tables)
        precise = torch.promote_types(tables[0].dtype, torch.float32)  # gradients of bf16 rows are summed in fp32
        leaves = {name: value_UC.to(device, precise).requires_grad_(training) for name, value_UC in zip(rows, values)}
        return Fetched(leaves=leaves, route=route)

    # Gradients and updates

    @torch.no_grad()
    def collect(self) -> None:
        """Brings the gradients of this step's reads to the rows: `.grad` of every table, sparse, mean over ranks.

        Raises:
            ValueError: a forward pass looked up rows that were not among those read ahead.
        """
        reads, self.open = self.open, []
        if self.ahead and self.ahead[0].used:
            reads.append(self.ahead.popleft())
        if not reads:
            return
        if any(bool(missing) for touched in reads for missing in touched.missing):
            raise ValueError("A forward pass needs rows that were not read ahead: give read_ahead all of its batches.")
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.tables}
        for touched in reads:
            for name, part in self._returned(touched).items():
                parts[name].append(part)
        for name, table_RC in self.tables.items():
            if parts[name]:
                rows, grads = (torch.cat(column) for column in zip(*parts[name]))
                grad = torch.sparse_coo_tensor(rows[None], grads, table_RC.shape, check_invariants=False)
                table_RC.grad = grad.to(table_RC.dtype) if table_RC.dtype != grad.dtype else grad

    def _returned(self, touched: Touched) -> dict[str, tuple[Tensor, Tensor]]:
        """Rows that this rank holds, and their gradients, from one read."""
        fetched = touched.fetched.result()
        if fetched.route is None:
            return {
                name: (rows_U.to(self.tables[name].device), leaf.grad.to(self.tables[name].device))
                for name, rows_U in touched.rows.items()
                if (leaf := fetched.leaves[name]).grad is not None
            }
        home = next(iter(self.tables.values())).device
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in fetched.leaves.values()]
        # In the worker, where there is one: ranks must not mix this exchange with a read that is under way.
        parts = self._run(partial(fetched.route.give_back, [grad_UC.to(home) for grad_UC in grads])).result()
        return {name: (rows, grad / self.num_ranks) for name, (rows, grad) in zip(touched.rows, parts)}

    def zero_grad(self) -> None:
        """Forgets the gradients of this step so far."""
        for touched in (*self.open, *(touched for touched in self.ahead if touched.used)):
            for leaf in touched.fetched.result().leaves.values():
                leaf.grad = None

    def _update(self, update: Callable[[], None]) -> None:
        self.updates = [done for done in self.updates if not done.done() or done.result()]
        self.updates.append(self._run(update))

    def _run(self, job: Callable[[], Any]) -> Future[Any]:
        """Does `job` now, or behind those before it where updates overlap with what the model computes."""
        if self.worker is not None:
            return self.worker.submit(job)
        done: Future[Any] = Future()
        done.set_result(job())
        return done

    def flush(self) -> None:
        """Waits for every update."""
        for update in self.updates:
            update.result()
        self.updates = []

    # Checkpoints

    def save(self, directory: Path) -> None:
        """As `RowSource.save`. With several ranks all of them must call it; each writes its own rows into one file."""
        self.flush()
        layouts = {name: {f"{name}.weight": (t.dtype, self.modules[name].shape)} for name, t in self.tables.items()}
        self._lay_out(directory, "", layouts)
        for name, table_RC in self.tables.items():
            write_rows(directory / table_shard(name), f"{name}.weight", self._first_row(name), table_RC)
        self._barrier()
        if self.is_first:
            write_index(directory, [f"{name}.weight" for name in self.tables])
            finish_checkpoint(directory)

    def save_state(self, directory: Path, optimizer: RowOptimizer) -> None:
        """Adds the optimizer's state of every row, a shard for each table; as `save`."""
        self.flush()
        layouts = {
            name: {
                f"{name}.{key}": (dtype, shape)
                for key, (shape, dtype) in optimizer.layout(self.modules[name].shape).items()
            }
            for name in self.tables
        }
        self._lay_out(directory, ".optimizer", layouts)
        for name, table_RC in self.tables.items():
            for key, values in optimizer.state[table_RC].items():
                write_rows(directory / table_shard(name + ".optimizer"), f"{name}.{key}", self._first_row(name), values)
        self._barrier()

    def load(self, directory: Path) -> None:
        """Reads this rank's rows from a checkpoint, whatever number of ranks wrote it."""
        self.flush()
        for name, table_RC in self.tables.items():
            read_rows(directory / table_shard(name), f"{name}.weight", self._first_row(name), table_RC.detach())

    def load_state(self, directory: Path, optimizer: RowOptimizer) -> None:
        """Reads the optimizer's state of this rank's rows; as `load`."""
        for name, table_RC in self.tables.items():
            path = directory / table_shard(name + ".optimizer")
            if not path.exists():
                raise ValueError(
                    f"{directory} has no {path.name}, the row optimizer's state: copy the checkpoint again."
                )
            optimizer.state.pop(table_RC, None)
            for key, values in optimizer.state_of(table_RC).items():
                read_rows(path, f"{name}.{key}", self._first_row(name), values)

    def _first_row(self, name: str) -> int:
        return own_rows(self.modules[name].shape[0], self.group)[0]

    def _lay_out(self, directory: Path, suffix: str, layouts: Mapping[str, Any]) -> None:
        if self.is_first:
            for name, layout in layouts.items():
                lay_out(directory / table_shard(name + suffix), layout)
        self._barrier()

    def _barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)


def place_tables(
    model: nn.Module,
    *,
    where: Where = "ram",
    folder: str | Path = "tables",
    overlap: Overlap = "auto",
    checkpoint: Path | None = None,
) -> TablePlacement:
    """Takes every `MemoryTable` out of a model's parameters and holds its rows where you say.

    Where torch.distributed has several ranks, each holds an equal share of every table, and all must call this.

    Args:
        where: "device", that of the model; "ram", of this machine; "file", mapped in `folder`, larger than RAM.
        overlap: when rows are updated, if they are not on the device. "none": within the optimizer's step. "exact":
            behind the next forward pass, up to its first block with memory. "stale": that pass does not wait, and reads
            rows one update old. "auto": exact with an accelerator, none without.
        checkpoint: a folder to read the rows from. None keeps the model's own, or draws those of a model that was built
            with rows="elsewhere".

    Raises:
        ValueError: no tables, tables that are placed already, or another `where` or `overlap`.
    """
    tables = {name: module for name, module in model.named_modules() if isinstance(module, MemoryTable)}
    if not tables or any(table.source is not None for table in tables.values()):
        why = "its memory tables are placed already" if tables else "it has no memory tables"
        raise ValueError(f"{type(model).__name__} cannot be placed: {why}.")
    for name, value, allowed in (("where", where, get_args(Where)), ("overlap", overlap, get_args(Overlap))):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")
    group = None
    if dist.is_initialized() and dist.get_world_size() > 1:
        group = dist.group.WORLD if where == "device" else dist.new_group(backend="gloo")
    backbone = next(iter(model.parameters()))
    placement = TablePlacement(tables, where=where, folder=Path(folder), group=group, overlap=overlap)
    std = getattr(getattr(model, "config", None), "initializer_range", 0.02)
    placement.take(std, backbone.device, backbone.dtype, checkpoint)
    return placement


def placement_of(model: nn.Module) -> TablePlacement | None:
    """What holds a model's tables, or None where they are its own."""
    for module in model.modules():
        if isinstance(module, MemoryTable) and isinstance(module.source, TablePlacement):
            return module.source
    return None
