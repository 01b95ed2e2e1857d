"""Copies tables into new folders, in other shards or another encoding, with a few MiB in memory at once.

Letters: U rows of a block, C row width, S bytes of a stored row.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from engrammar.config import Encoding
from engrammar.tables.checksums import MANIFEST
from engrammar.tables.encodings import FLOATS, FP8_MAX, decode, encode
from engrammar.tables.folder import TableFile, TableFolder, TableWriter, open_tables, tables_of
from engrammar.tables.headers import read_json
from engrammar.tables.memory_json import describe_checkpoint
from engrammar.tables.shards import INDEX, MEMORY, table_shard, weight_map
from engrammar.tables.verify import read_table

# Files that only training reads: serving does not need them, and they are larger than the tables.
TRAINING = ("*memory.tables.*", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json", "*_args.bin")


@dataclass(kw_only=True)
class Error:
    """How much an encoding changes the values of a table, in sums over all values."""

    squares: float = 0.0
    squared_errors: float = 0.0

    @property
    def relative(self) -> float:
        """The root mean square of the errors, divided by that of the values."""
        return math.sqrt(self.squared_errors / self.squares) if self.squares else 0.0


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A folder that was made, and for each layer how much the encoding changed."""

    tables: TableFolder
    errors: dict[int, Error] = field(default_factory=dict)


def pack(source: Path, out: Path, *, shard_bytes: int | None = None, tables_only: bool = False) -> Converted:
    """Copies tables unchanged, with the other files of their folder, except those that only training reads.

    Args:
        source: a checkpoint of any version, or a folder of tables.
        shard_bytes: the most bytes of rows in one file; None writes one file for each table.
        tables_only: leaves the other files out.

    Raises:
        ValueError: a file is damaged, a value is not finite, or `out` exists already.
        OSError: the disk is full or fails; nothing of `out` is left.
    """
    tables = open_any(source)
    return _convert(tables, out, tables.encoding, shard_bytes, tables_only)


def quantize(
    source: Path,
    out: Path,
    *,
    encoding: Encoding,
    shard_bytes: int | None = None,
    tables_only: bool = False,
) -> Converted:
    """As `pack`, but with rows in another encoding; the `row_encoding` in the config of `out` is set to it."""
    tables = open_any(source)
    tables = replace(tables, memory=replace(tables.memory, row_encoding=encoding))
    return _convert(tables, out, encoding, shard_bytes, tables_only)


def open_any(folder: Path) -> TableFolder:
    """`open_tables`, also for checkpoints of versions that wrote no memory.json.

    Raises:
        ValueError: the folder is neither a checkpoint nor one of tables, or it is damaged.
    """
    if (folder / MEMORY).exists():
        return open_tables(folder)
    try:
        content = describe_checkpoint(folder)
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{folder} is not a checkpoint of engrammar ({error}): give another folder.") from error
    if content is None:
        raise ValueError(
            f"{folder} has neither {MEMORY} nor a config.json and {INDEX} of a model with memory tables in fp32 or "
            "bf16: give another folder; a model in fp16 can be saved anew after model.float()."
        )
    for entry in content["tables"].values():
        for shard in entry["shards"]:
            shard["crc32"] = shard["crc32"] if (folder / shard["crc32"]).exists() else None
    return tables_of(folder, content)


def _convert(
    source: TableFolder, out: Path, encoding: Encoding, shard_bytes: int | None, tables_only: bool
) -> Converted:
    errors = {layer: Error() for layer in source.tables}
    scaled = encoding == "fp8" != source.encoding  # the scale is known only after a first reading
    num_bytes = (1 + scaled) * sum(table.num_rows * table.row_bytes for table in source.tables.values())
    writer = TableWriter(
        out,
        memory=source.memory,
        geometry=source.geometry,
        encoding=encoding,
        num_ids=source.num_ids,
        tokenizer_sha256=source.tokenizer_sha256,
        source=source.source,
        shard_bytes=shard_bytes,
    )
    bar = tqdm(desc=f"writing {out}", total=num_bytes, unit="B", unit_scale=True, delay=2, leave=False)
    with writer, bar:

        def blocks(table: TableFile) -> Iterator[Tensor]:
            for rows_US in read_table(source, table):
                bar.update(rows_US.nbytes)
                yield torch.from_numpy(rows_US)

        if not tables_only:
            _copy_others(source, writer.partial)
        for layer, table in source.tables.items():
            scale = _fp8_scale(table, blocks(table)) if scaled else table.scale if encoding == "fp8" else None
            writer.add(layer, scale, _encoded(table, blocks(table), encoding, scale, errors[layer]), table.name)
        if not tables_only and (source.path / INDEX).is_file():
            _write_index(source, writer.partial, encoding)
    return Converted(tables=open_tables(out), errors=errors)


def _encoded(
    table: TableFile, blocks: Iterator[Tensor], encoding: Encoding, scale: float | None, error: Error
) -> Iterator[Tensor]:
    """Yields rows in `encoding`; rows that have it already are not changed."""
    for values_UC, rows_US in _values(table, blocks, encoding != table.encoding or encoding in FLOATS):
        if encoding == table.encoding:
            yield rows_US
            continue
        encoded_US = encode(values_UC, encoding, scale)
        found_UC = decode(encoded_US, table.width, encoding, torch.float32, scale)
        error.squares += float(values_UC.double().square().sum())
        error.squared_errors += float((values_UC.double() - found_UC.double()).square().sum())
        yield encoded_US


def _values(table: TableFile, blocks: Iterator[Tensor], decoded: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the values [U, C] of blocks of rows, which must be finite, and the blocks; no values unless `decoded`."""
    first = 0
    for rows_US in blocks:
        values_UC = torch.empty(0)
        if decoded:
            values_UC = decode(rows_US, table.width, table.encoding, torch.float32, table.scale)
            finite_U = values_UC.isfinite().all(1)
            if not finite_U.all():
                row = first + int((~finite_U).nonzero()[0])
                raise ValueError(
                    f"Row {row} of table {table.layer} ({table.name}) holds NaN or infinity: the model that it is of "
                    "is broken; go back to an earlier checkpoint."
                )
        yield values_UC, rows_US
        first += len(rows_US)


def _fp8_scale(table: TableFile, blocks: Iterator[Tensor]) -> float:
    """The scale that brings a table's largest value to fp8's largest."""
    largest = max((float(values_UC.abs().max()) for values_UC, _ in _values(table, blocks)), default=0.0)
    return float(torch.tensor(largest / FP8_MAX)) or 1.0


def _copy_others(source: TableFolder, out: Path) -> None:
    """Copies the files beside the tables, and updates the row encoding in a model's config."""
    own = {path for table in source.tables.values() for s in table.shards for path in (s.path, s.crc32)}
    for path in sorted(source.path.iterdir()):
        skipped = path in own or path.name in (MANIFEST, MEMORY, INDEX) or any(map(path.match, TRAINING))
        if path.is_file() and not skipped:
            shutil.copyfile(path, out / path.name)
    config = out / "config.json"
    if config.is_file():
        settings = read_json(config)
        memory = settings.get("memory")
        if isinstance(memory, dict) and memory.get("row_encoding") != source.memory.row_encoding:
            memory["row_encoding"] = source.memory.row_encoding
            config.write_text(json.dumps(settings, indent=2) + "\n")


def _write_index(source: TableFolder, out: Path, encoding: Encoding) -> None:
    """Writes the index of the weights. It lists the tables that transformers can read as weights: whole, in floats."""
    weights = weight_map(source.path)
    for table in source.tables.values():
        weights.pop(table.name, None)
        if encoding in FLOATS and (out / table_shard(table.name)).is_file():
            weights[table.name] = table_shard(table.name)
    size = sum((out / shard).stat().st_size for shard in set(weights.values()))
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weights}, indent=1)
    (out / INDEX).write_text(text + "\n")
