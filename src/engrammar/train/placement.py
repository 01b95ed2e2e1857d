"""Where a model's tables are while it trains: on the device, in RAM or in a mapped file; whole or sharded over ranks.

A placed table is not a parameter of its model, so code that moves, wraps, shards or clips the model's parameters does
not touch it. A read gathers the distinct rows of a batch once. Their values are a leaf of the graph, and after backward
the leaf's gradient is sent to the rank that holds the rows.
Letters: R rows of a table, U distinct rows of a read, C row width, H columns, E = H*C.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engrammar.config import check_choice
from engrammar.table import MemoryTable, Rows, RowSource, draw_rows_
from engrammar.tables.shards import lay_out, read_rows, table_shard, write_index, write_rows
from engrammar.train.exchange import Route, Sharing, Traffic, all_sum, broadcast, gather, own_rows, share
from engrammar.train.pages import zeros_in_file
from engrammar.train.row_optimizers import RowBackend, RowOptimizer, allocate

Where = Literal["device", "ram", "file"]
Overlap = Literal["auto", "none", "exact", "stale"]


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Rows that have arrived: for each table a leaf [U, C], at least fp32, on the ids' device; and their route."""

    leaves: dict[str, Tensor]
    route: Route | None


@dataclass(eq=False, kw_only=True)
class Read:
    """The distinct rows of one read, ascending, and their values once they have arrived."""

    rows: dict[str, Tensor]  # for each table, the distinct rows_U
    places: dict[str, Tensor]  # for each table, the index in rows_U of each row asked for, all passes one after another
    fetched: Future[Fetched]
    dtype: torch.dtype  # the dtype of the embeddings
    training: bool  # whether gradients will be collected
    collected: bool = False  # whether they have been collected, so that the values are those of an earlier step


class TablePlacement(RowSource):
    """Holds tables outside their model while it trains; made by `place_tables`."""

    def __init__(
        self,
        modules: Mapping[str, MemoryTable],
        *,
        where: Where,
        folder: Path,
        overlap: Overlap,
        **sharing: Unpack[Sharing],
    ) -> None:
        self.modules = dict(modules)
        self.where, self.folder = where, folder
        self.group, self.reduce = (group := sharing["group"]), sharing["reduce"]
        # This rank's rows of each table, a parameter whose `.grad` is sparse after `collect`.
        self.tables: dict[str, nn.Parameter] = {}
        self.stale = overlap == "stale"
        overlaps = overlap in ("exact", "stale") or (overlap == "auto" and torch.accelerator.is_available())
        self.worker = ThreadPoolExecutor(max_workers=1) if overlaps and where != "device" else None
        self.updates: list[Future[None]] = []
        self.open: list[Read] = []  # reads that a training pass waited for since the last `collect`
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.traffic = Traffic()  # what has been read and sent so far
        self.num_ranks = 1 if group is None else dist.get_world_size(group)
        self.is_first = group is None or dist.get_rank(group) == 0
        self.backend = RowBackend(
            allocate=self._allocate,
            submit=self._update,
            all_sum=partial(all_sum, group=group),
            is_sharded=self.num_ranks > 1,
        )

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        in_file = self.where == "file"
        return zeros_in_file(shape, dtype, self.folder) if in_file else allocate(shape, dtype, device)

    @torch.no_grad()
    def take(self, std: float, device: torch.device, dtype: torch.dtype, checkpoint: Path | None) -> None:
        """Takes the tables out of the model, with the rows of `checkpoint`, else its own, else newly drawn ones."""
        seeds = broadcast({name: table.init_seed for name, table in self.modules.items()}, self.group)
        home = device if self.where == "device" else torch.device("cpu")
        for name, table in self.modules.items():
            given = table.weight
            first, end = own_rows(table.shape[0], self.group)
            stays = self.num_ranks == 1 and self.where != "file" and given is not None and given.device == home
            if checkpoint is None and given is not None and stays:
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
            table.move_to(self, name)
            self.hooks.append(table.register_load_state_dict_pre_hook(self._take_rows))

    @torch.no_grad()
    def _take_rows(self, table: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Runs before a table loads its state: takes this rank's rows if `state_dict` holds the whole table."""
        whole_RC = state_dict.pop(prefix + "weight", None)
        if whole_RC is None:
            return
        assert isinstance(table, MemoryTable)
        if tuple(whole_RC.shape) != table.shape:
            raise ValueError(f"{prefix}weight has shape {list(whole_RC.shape)}; the table's is {list(table.shape)}.")
        self.flush()
        first, end = own_rows(table.shape[0], self.group)
        self.tables[table.name].copy_(whole_RC[first:end])

    def release(self) -> bool:
        """Gives the tables back to the model as its parameters; returns False if they are in a file or sharded."""
        self.flush()
        self.open.clear()
        if self.where == "file" or self.num_ranks > 1:
            return False
        for hook in self.hooks:
            hook.remove()
        for name, table in self.modules.items():
            table.take_back(self.tables[name])
        return True

    @property
    def reads_together(self) -> bool:
        """Whether it saves anything to read the rows of all passes of a step together, before the step."""
        return self.where != "device" or self.num_ranks > 1

    # Reading

    @torch.compiler.disable  # a graph breaks here, and at each layer's wait
    def read(self, passes: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Callable[[], Rows]]]:
        """As `RowSource.read`; each distinct row of all passes is read once. All ranks must call it together.

        In training, `collect` brings back the gradients of passes that have waited for their rows.
        """
        rows = {name: torch.cat([one[name].flatten() for one in passes]) for name in passes[0]}
        distinct = {name: row_numbers.unique(return_inverse=True) for name, row_numbers in rows.items()}
        rows_U = {name: found[0] for name, found in distinct.items()}
        self.traffic.num_looked_up += sum(row_numbers.numel() for row_numbers in rows.values())
        self.traffic.num_distinct += sum(len(found) for found in rows_U.values())
        training = torch.is_grad_enabled() and any(self.tables[name].requires_grad for name in rows)
        read = Read(
            rows=rows_U,
            places={name: found[1] for name, found in distinct.items()},
            fetched=self._run(partial(self._fetch, rows_U, training)),
            dtype=next(iter(self.tables.values())).dtype,
            training=training,
        )
        waits: list[dict[str, Callable[[], Rows]]] = [{} for _ in passes]
        for name in rows:
            parts = read.places[name].split([one[name].numel() for one in passes])
            for wait, one, part in zip(waits, passes, parts):
                wait[name] = partial(self._look_up, read, name, part.view(one[name].shape))
        return waits

    @torch.compiler.disable
    def _look_up(self, read: Read, name: str, places: Tensor) -> Rows:
        """The embedding [..., E] of the rows at the given places [..., H] of a read."""
        if read.collected:
            raise ValueError("These rows were retrieved for an earlier step: call retrieve again.")
        leaf_UC = read.fetched.result().leaves[name]
        if read.training and read not in self.open:
            self.open.append(read)
        return Rows(nn.functional.embedding(places, leaf_UC).to(read.dtype).flatten(-2))

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
        """Sets `.grad` of every table to the sparse gradient of this step's reads, reduced over ranks."""
        reads, self.open = self.open, []
        if not reads:
            return
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.tables}
        for read in reads:
            read.collected = True
            for name, part in self._returned(read).items():
                parts[name].append(part)
        for name, table_RC in self.tables.items():
            if parts[name]:
                rows, grads = (torch.cat(column) for column in zip(*parts[name]))
                grad = torch.sparse_coo_tensor(rows[None], grads, table_RC.shape, check_invariants=False)
                table_RC.grad = grad.to(table_RC.dtype) if table_RC.dtype != grad.dtype else grad

    def _returned(self, read: Read) -> dict[str, tuple[Tensor, Tensor]]:
        """For each table, the rows of one read that this rank holds, and their gradients."""
        fetched = read.fetched.result()
        if fetched.route is None:
            return {
                name: (rows_U.to(self.tables[name].device), leaf.grad.to(self.tables[name].device))
                for name, rows_U in read.rows.items()
                if (leaf := fetched.leaves[name]).grad is not None
            }
        home = next(iter(self.tables.values())).device
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in fetched.leaves.values()]
        # In the worker, if there is one: ranks must not mix this exchange with a read that is under way.
        parts = self._run(partial(fetched.route.give_back, [grad_UC.to(home) for grad_UC in grads])).result()
        divisor = self.num_ranks if self.reduce == "mean" else 1
        return {name: (rows, grad / divisor) for name, (rows, grad) in zip(read.rows, parts)}

    def zero_grad(self) -> None:
        """Drops the gradients of this step so far."""
        for read in self.open:
            for leaf in read.fetched.result().leaves.values():
                leaf.grad = None

    def _update(self, update: Callable[[], None]) -> None:
        finished = [done for done in self.updates if done.done()]
        for done in finished:
            done.result()  # raises what went wrong
        self.updates = [done for done in self.updates if done not in finished]
        self.updates.append(self._run(update))

    def _run(self, job: Callable[[], Any]) -> Future[Any]:
        """Runs `job` now or, if updates overlap with the model's computation, in the worker after earlier jobs."""
        if self.worker is not None:
            return self.worker.submit(job)
        done: Future[Any] = Future()
        done.set_result(job())
        return done

    def flush(self) -> None:
        """Waits until all updates are done."""
        for update in self.updates:
            update.result()
        self.updates = []

    # Checkpoints

    def whole(self, name: str, rows_per_block: int) -> Iterator[Tensor]:
        self.flush()
        yield from gather(self.tables[name].detach(), self.modules[name].shape[0], self.group, rows_per_block)

    def save(self, directory: Path) -> None:
        """As `RowSource.save`. All ranks must call it; each writes its own rows into the same file."""
        self.flush()
        self._write(directory, "", {name: {"weight": table_RC} for name, table_RC in self.tables.items()})
        if self.is_first:
            write_index(directory, [f"{name}.weight" for name in self.tables])

    def save_state(self, directory: Path, optimizer: RowOptimizer) -> None:
        """Adds the optimizer's state of every row, with one shard per table. All ranks must call it."""
        self.flush()
        states = {name: optimizer.state_of(table_RC) for name, table_RC in self.tables.items()}
        self._write(directory, ".optimizer", states)

    def _write(self, directory: Path, suffix: str, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Writes what this rank has of each table's rows into the file of the table, which all ranks share."""
        for name, own in parts.items() if self.is_first else ():
            num_rows = self.modules[name].shape[0]
            whole = {f"{name}.{key}": (part.dtype, (num_rows, *part.shape[1:])) for key, part in own.items()}
            lay_out(directory / table_shard(name + suffix), whole)
        self._barrier()
        for name, own in parts.items():
            for key, part in own.items():
                write_rows(directory / table_shard(name + suffix), f"{name}.{key}", self._first_row(name), part)
        self._barrier()

    def load(self, directory: Path) -> None:
        """Reads this rank's rows from a checkpoint, which any number of ranks may have written."""
        self.flush()
        for name, table_RC in self.tables.items():
            read_rows(directory / table_shard(name), f"{name}.weight", self._first_row(name), table_RC.detach())

    def load_state(self, directory: Path, optimizer: RowOptimizer) -> None:
        """Reads the optimizer's state of this rank's rows; raises a ValueError if a checkpoint has none that fits."""
        self.flush()
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
    **sharing: Unpack[Sharing],
) -> TablePlacement:
    """Takes every `MemoryTable` out of a model's parameters and holds its rows in the given place.

    If torch.distributed has several ranks, each holds an equal share of every table, and all must call this. `sharing`
    is `group=`, the process group of the ranks that share the tables (by default all), and `reduce=`, what the loop
    does with the other gradients over these ranks: "mean" (the default; DDP and FSDP) or "sum" (engines whose loss is
    divided by the tokens of all ranks).

    Args:
        where: "device": on the model's device; "ram": in this machine's RAM; "file": in a mapped file in `folder`,
            which may be larger than RAM.
        folder: the folder of the file.
        overlap: when rows are updated, if they are not on the device. "none": within the optimizer's step. "exact":
            during the next forward pass, until its first block with memory. "stale": that pass does not wait, and reads
            rows that are one update old. "auto": "exact" with an accelerator, "none" without.
        checkpoint: a folder to read the rows from. None keeps the model's own rows, or draws new ones for a model that
            was built with tables="external".

    Raises:
        ValueError: there are no tables, they are placed or served already or a patch replaces their rows, this rank is
            not in `group`, or a choice is not allowed.
    """
    tables = {name: module for name, module in model.named_modules() if isinstance(module, MemoryTable)}
    sources = [table.source for table in tables.values() if table.source is not None]
    if not tables:
        raise ValueError(f"{type(model).__name__} cannot be placed: it has no memory tables.")
    if any(isinstance(source, TablePlacement) for source in sources):
        raise ValueError(f"{type(model).__name__} cannot be placed: its memory tables are placed already.")
    if sources:
        raise ValueError(
            f"{type(model).__name__} cannot be placed: its memory tables are served, which cannot change them. Load it "
            "without `memory` to train it."
        )
    if any(table._forward_hooks for table in tables.values()):
        raise ValueError(
            f"{type(model).__name__} cannot be placed: a patch replaces rows of its tables, which would be left out. "
            "Undo the patch."
        )
    check_choice("where", where, Where)
    check_choice("overlap", overlap, Overlap)
    backbone = next(iter(model.parameters()))
    shared = share(on_device=where == "device", **sharing)
    placement = TablePlacement(tables, where=where, folder=Path(folder), overlap=overlap, **shared)
    std = getattr(getattr(model, "config", None), "initializer_range", 0.02)
    placement.take(std, backbone.device, backbone.dtype, checkpoint)
    return placement


def placement_of(model: nn.Module) -> TablePlacement | None:
    """The placement that holds a model's tables; None if they are not placed."""
    for module in model.modules():
        if isinstance(module, MemoryTable) and isinstance(module.source, TablePlacement):
            return module.source
    return None
