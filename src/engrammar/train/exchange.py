"""Exchanges the rows of sharded tables: one all-to-all brings the rows that a rank asked for, one returns gradients.

A table's rows are cut into equal runs, one per rank.
Letters: P peers (ranks), L tables, U distinct rows, C row width.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from engrammar.config import check_choice

Group = dist.ProcessGroup
Reduce = Literal["mean", "sum"]


class Sharing(TypedDict, total=False):
    """Who shares tables, and what is done with gradients over them; `place_tables` says more."""

    group: Group | None
    reduce: Reduce


def share(*, on_device: bool, group: Group | None = None, reduce: Reduce = "mean") -> Sharing:
    """Checks the arguments of `place_tables` and makes the group in which rows are exchanged, None for one rank.

    Args:
        on_device: whether rows stay on the device. Otherwise they get a gloo group of their own, since a thread may
            exchange them while the model uses `group`.

    Raises:
        ValueError: this rank is not in `group`, or `reduce` is not allowed.
    """
    check_choice("reduce", reduce, Reduce)
    if not dist.is_initialized():
        return {"group": None, "reduce": reduce}
    if dist.get_rank(group) < 0:
        raise ValueError(f"Rank {dist.get_rank()} is not in the group: only its ranks may call place_tables with it.")
    if dist.get_world_size(group) == 1:
        return {"group": None, "reduce": reduce}
    if on_device:
        own = group or dist.group.WORLD
    elif group is None:
        own = dist.new_group(backend="gloo")
    else:
        ranks = dist.get_process_group_ranks(group)
        own = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return {"group": own, "reduce": reduce}


def own_rows(num_rows: int, group: Group | None, rank: int | None = None) -> tuple[int, int]:
    """The rows that a rank (None: this one) holds of a table of `num_rows` rows: the first, and one past the last."""
    if group is None:
        return 0, num_rows
    per_rank = _per_rank(num_rows, group)
    first = min(num_rows, (dist.get_rank(group) if rank is None else rank) * per_rank)
    return first, min(num_rows, first + per_rank)


def gather(own_UC: Tensor, num_rows: int, group: Group | None, rows_per_block: int) -> Iterator[Tensor]:
    """Yields a table's rows in order, block by block, on the first rank; the others send theirs, and yield nothing."""
    if group is None:
        yield from own_UC.split(rows_per_block)
        return
    rank, bytes_UB = dist.get_rank(group), own_UC.contiguous().view(torch.uint8)  # gloo knows no bf16
    for owner in range(dist.get_world_size(group)):
        first, end = own_rows(num_rows, group, owner)
        for start in range(first, end, rows_per_block):
            size = min(rows_per_block, end - start)
            if rank == owner:
                block = bytes_UB[start - first : start - first + size]
                if rank:
                    dist.send(block, group=group, group_dst=0)
            elif rank == 0:
                block = bytes_UB.new_empty(size, bytes_UB.shape[1])
                dist.recv(block, group=group, group_src=owner)
            if rank == 0:
                yield block.view(own_UC.dtype)


def _per_rank(num_rows: int, group: Group) -> int:
    return -(-num_rows // dist.get_world_size(group))


@dataclass(kw_only=True)
class Traffic:
    """What this rank looked up, in rows (`num_*`), and what it sent to other ranks, in bytes."""

    num_looked_up: int = 0
    num_distinct: int = 0
    ids: int = 0
    rows: int = 0
    gradients: int = 0


@dataclass(frozen=True, kw_only=True)
class Route:
    """The rows that ranks asked of each other in one read."""

    group: Group
    asked_PL: list[list[int]]  # how many rows of each table this rank asked of each peer
    served_PL: list[list[int]]  # how many rows of each table each peer asked of this rank
    # The rows that were asked of this rank, numbered from its first row; by peer, then by table.
    served_rows: list[Tensor]
    traffic: Traffic = field(repr=False)

    @classmethod
    def ask(cls, rows: Sequence[Tensor], sizes: Sequence[int], group: Group, traffic: Traffic) -> "Route":
        """Asks every rank for its part of `rows`: for each table, ascending distinct rows; `sizes` are the tables'."""
        num_ranks = dist.get_world_size(group)
        ends = [
            torch.searchsorted(rows_U, _per_rank(size, group) * torch.arange(1, num_ranks + 1, device=rows_U.device))
            for rows_U, size in zip(rows, sizes)
        ]
        asked_LP = torch.stack([ends_P.diff(prepend=ends_P.new_zeros(1)) for ends_P in ends])
        asked = asked_LP.T.contiguous()
        served = torch.empty_like(asked)
        dist.all_to_all_single(served, asked, group=group)
        asked_PL, served_PL = asked.tolist(), served.tolist()
        local = [rows_U % _per_rank(size, group) for rows_U, size in zip(rows, sizes)]
        wanted = torch.cat(_by_peer([rows_U.split(c) for rows_U, c in zip(local, asked_LP.tolist())]))
        served_ids = _all_to_all(wanted, _totals(asked_PL), _totals(served_PL), group)
        served_rows = list(served_ids.split([count for counts_L in served_PL for count in counts_L]))
        route = cls(group=group, asked_PL=asked_PL, served_PL=served_PL, served_rows=served_rows, traffic=traffic)
        traffic.ids += route._sent(asked_PL) * wanted.element_size()
        return route

    def bring(self, tables: Sequence[Tensor]) -> list[Tensor]:
        """Returns the rows that were asked of each table, [U, C], in the order asked for."""
        num_tables = len(tables)
        served = [tables[i % num_tables].index_select(0, rows) for i, rows in enumerate(self.served_rows)]
        brought = _all_to_all(torch.cat(served), _totals(self.served_PL), _totals(self.asked_PL), self.group)
        self.traffic.rows += self._sent(self.served_PL) * _row_bytes(tables[0])
        parts = brought.split([count for counts_L in self.asked_PL for count in counts_L])
        return [torch.cat(parts[table::num_tables]) for table in range(num_tables)]

    def give_back(self, gradients: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Sends the gradients of the rows asked for to the ranks that hold them.

        Returns:
            For each table, the rows of this rank (with repeats, in the order of the peers) and their gradients.
        """
        num_tables = len(gradients)
        asked_LP = list(zip(*self.asked_PL))
        outgoing = torch.cat(_by_peer([grad_UC.split(c) for grad_UC, c in zip(gradients, asked_LP)]))
        incoming = _all_to_all(outgoing, _totals(self.asked_PL), _totals(self.served_PL), self.group)
        self.traffic.gradients += self._sent(self.asked_PL) * _row_bytes(outgoing)
        parts = incoming.split([count for counts_L in self.served_PL for count in counts_L])
        return [
            (torch.cat(self.served_rows[table::num_tables]), torch.cat(parts[table::num_tables]))
            for table in range(num_tables)
        ]

    def _sent(self, counts_PL: list[list[int]]) -> int:
        """The number of rows that go to other ranks."""
        return sum(_totals(counts_PL)) - sum(counts_PL[dist.get_rank(self.group)])


def _row_bytes(tensor: Tensor) -> int:
    return tensor.shape[1] * tensor.element_size()


def _by_peer(parts_LP: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [part for parts_L in zip(*parts_LP) for part in parts_L]


def _totals(counts_PL: Sequence[Sequence[int]]) -> list[int]:
    return [sum(counts_L) for counts_L in counts_PL]


def _all_to_all(sent: Tensor, send_counts: list[int], receive_counts: list[int], group: Group) -> Tensor:
    received = sent.new_empty(sum(receive_counts), *sent.shape[1:])
    dist.all_to_all_single(received, sent.contiguous(), receive_counts, send_counts, group=group)
    return received


def all_sum(tensor: Tensor, group: Group | None) -> Tensor:
    """Sums a tensor over ranks, in place."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def rejoin_processes(backend: str) -> None:
    """Makes the process group of processes that torchrun restarted on one machine; does nothing elsewhere.

    torchrun keeps one store over its restarts, in which new processes would find the addresses of dead ones. On several
    machines no process knows how often the others restarted; there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun
    use a new store each time.
    """
    num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not kept or not num_restarts or int(os.environ["LOCAL_WORLD_SIZE"]) < num_ranks or dist.is_initialized():
        return
    kept_store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"restart-{num_restarts}", kept_store)
    dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=num_ranks)


def leave_processes() -> None:
    """Ends the process group once all ranks have called this: a rank that exits earlier can make others fail."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def broadcast(values: Mapping[str, int | None], group: Group | None) -> dict[str, int | None]:
    """Returns the first rank's values on every rank."""
    if group is None:
        return dict(values)
    box = [dict(values)]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]
