"""What a token's rows cost on a machine, for each tier.

Letters: R rows, S bytes of a row, U rows read.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self, TypeVar

import numpy as np

from engrammar.config import MemoryConfig
from engrammar.stores.disk import DiskStore
from engrammar.tables.folder import Shard, TableFile
from engrammar.tables.headers import PAGE

PROBE_ROWS, PROBE_READS = 2**19, 2**15
TIERS = ("ram", "disk", "remote")


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a machine can do in a second; None: not known."""

    ram_rows_per_s: float | None = None  # rows gathered from RAM, in large calls
    disk_reads_per_s: float | None = None  # 4 KiB reads from its disk, at the queue depth where it is fastest
    remote_rows_per_s: float | None = None  # rows read from a pool on other machines
    compute_tokens_per_s: float | None = None  # tokens of the model alone, as if its tables cost nothing

    @classmethod
    def read(cls, path: Path) -> Self:
        """As `read_figures`."""
        return read_figures(cls, path)


Figures = TypeVar("Figures")


def read_figures(kind: type[Figures], path: Path) -> Figures:
    """Builds a dataclass of JSON figures; raises a ValueError at other names, and at values that are not above 0."""
    known = ", ".join(field.name for field in fields(kind))  # type: ignore[arg-type]
    try:
        settings = json.loads(path.read_text())
        figures = kind(**settings)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a machine's description ({error}): give JSON with any of {known}.") from error
    for name, value in settings.items():
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{name} in {path} is {value!r}; allowed: a number above 0.")
    return figures


def measure_speeds(row_size: int, folder: Path) -> Speeds:
    """Measures RAM and the disk of `folder` with some ten thousand rows of each; the other speeds stay None."""
    random = np.random.default_rng(0)
    rows_RS = random.integers(0, 256, (PROBE_ROWS, row_size), dtype=np.uint8)
    rows_U = random.integers(0, PROBE_ROWS, PROBE_READS)
    seconds = min(_time(lambda: rows_RS.take(rows_U, axis=0)) for _ in range(3))
    with TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "rows"
        pages_RS = np.resize(rows_RS, (PROBE_ROWS // 16, PAGE))
        path.write_bytes(pages_RS.data)
        shard = Shard(path=path, tensor="", start=0, first_row=0, num_rows=len(pages_RS), crc32=None)
        file = TableFile(
            layer=0, name="probe", num_rows=len(pages_RS), width=PAGE // 2, encoding="bf16", scale=None, shards=(shard,)
        )
        store = DiskStore(file)
        distinct_U = random.permutation(len(pages_RS))[:PROBE_READS]
        disk_seconds = _time(lambda: store.fetch(distinct_U).wait())
        store.close()
    return Speeds(ram_rows_per_s=PROBE_READS / seconds, disk_reads_per_s=len(distinct_U) / disk_seconds)


def _time(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class Costs:
    """How long a token's rows take."""

    memory: MemoryConfig
    speeds: Speeds
    pages_per_row: float  # pages that are read for a row that is not in the cache

    def seconds_per_row(self, tier: str) -> tuple[float, float] | None:
        """Seconds for a row in the cache, and for one that is not; None if a speed is not known."""
        speeds = self.speeds
        if speeds.ram_rows_per_s is None:
            return None
        ram = 1 / speeds.ram_rows_per_s
        if tier == "ram":
            return ram, ram
        if tier == "disk":
            return (
                None if speeds.disk_reads_per_s is None else (ram, ram + self.pages_per_row / speeds.disk_reads_per_s)
            )
        return None if speeds.remote_rows_per_s is None else (ram, ram + 1 / speeds.remote_rows_per_s)

    def tokens_per_s(self, tier: str, hit_rate: float) -> dict[str, float] | None:
        """Tokens/s of the rows alone and, if the model's speed is known, with prefetch (both at once) and without."""
        if (seconds := self.seconds_per_row(tier)) is None:
            return None
        hit, miss = seconds
        rows = 1 / (len(self.memory.layers) * self.memory.num_columns * (hit_rate * hit + (1 - hit_rate) * miss))
        compute = self.speeds.compute_tokens_per_s
        both = {} if compute is None else {"prefetched": min(rows, compute), "waiting": 1 / (1 / rows + 1 / compute)}
        return {"rows_alone": rows} | both

    def hit_rate_for(self, tier: str, tokens_per_s: float) -> float | None:
        """The smallest hit rate that gives `tokens_per_s` with prefetch; above 1 if none does."""
        if (seconds := self.seconds_per_row(tier)) is None:
            return None
        hit, miss = seconds
        compute = self.speeds.compute_tokens_per_s
        if compute is not None and compute < tokens_per_s:
            return 2.0
        allowed = 1 / (tokens_per_s * len(self.memory.layers) * self.memory.num_columns)
        if miss <= allowed:
            return 0.0
        return 2.0 if hit > allowed else (miss - allowed) / (miss - hit)
