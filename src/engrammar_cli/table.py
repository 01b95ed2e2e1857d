"""`engrammar table ...`: what can be done with table files. Imports are inside the functions, as in `main.py`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from engrammar_cli.extras import Json, by_name

if TYPE_CHECKING:
    from engrammar.tables.convert import Converted


def info(folder: Positional[Path], /, json_output: Json = False) -> None:
    """What a folder's tables are; headers are checked, rows are not read.

    Args:
        folder: A checkpoint, or a folder of tables.
    """
    from engrammar.cells import as_text
    from engrammar.tables.folder import open_tables

    opened = open_tables(folder)
    tables: dict[int, dict[str, Any]] = {
        layer: {
            "name": table.name,
            "rows": table.num_rows,
            "width": table.width,
            "row_bytes": table.row_bytes,
            "bytes": table.num_rows * table.row_bytes,
            "shards": len(table.shards),
            "page_checksums": all(shard.crc32 is not None for shard in table.shards),
        }
        for layer, table in opened.tables.items()
    }
    about = {key: getattr(opened, key) for key in ("source", "encoding", "num_ids", "tokenizer_sha256")}
    if json_output:
        print(json.dumps({**about, "tables": tables}, indent=1))
        return
    print(f"{folder}: {opened.source}, rows in {opened.encoding}")
    header = ["layer", "rows", "width", "bytes a row", "bytes", "files", "checksums"]
    lines = []
    for layer, table in tables.items():
        numbers = [f"{table[key]:,}" for key in ("rows", "width", "row_bytes", "bytes", "shards")]
        lines.append([str(layer), *numbers, "yes" if table["page_checksums"] else "no"])
    print(as_text(header, lines))


def pack(
    source: Positional[Path],
    out: Positional[Path],
    /,
    shard_bytes: int | None = None,
    tables_only: bool = False,
) -> None:
    """Copy tables, with the model they belong to, into a new folder; checkpoints of older versions are read too.

    Args:
        source: A checkpoint, or a folder of tables.
        out: The new folder.
        shard_bytes: The most bytes of rows in one file; without it, one file for each table.
        tables_only: Leave out the rest of the model.
    """
    from engrammar.tables import convert

    _show(convert.pack(source, out, shard_bytes=shard_bytes, tables_only=tables_only))


def quantize(
    source: Positional[Path],
    out: Positional[Path],
    /,
    encoding: Literal["fp32", "bf16", "fp8", "fp8_row", "fp8_scale32", "int8", "int4"],
    shard_bytes: int | None = None,
    tables_only: bool = False,
) -> None:
    """Copy tables as pack does, with rows in another encoding, and print the error of each table.

    Args:
        source: A checkpoint, or a folder of tables.
        out: The new folder, from which the model is served with its tables in RAM or on disk.
        encoding: How a row is stored.
        shard_bytes: The most bytes of rows in one file; without it, one file for each table.
        tables_only: Leave out the rest of the model.
    """
    from engrammar.tables import convert

    made = convert.quantize(source, out, encoding=encoding, shard_bytes=shard_bytes, tables_only=tables_only)
    _show(made)
    for layer, error in made.errors.items():
        print(f"table {layer}: relative RMS error {error.relative:.3%}")


def import_(model: Positional[Path], out: Positional[Path], /, names: Path | None = None) -> None:
    """Make table files from a released model's tables: Qwen3.8-Flash-Next or DeepSeek-V4.1-Flash.

    Args:
        model: The folder of the release; config.json and the files that hold the tables are enough.
        out: The new folder.
        names: A JSON file with the names of the tensors, for files that name them otherwise than the release.
    """
    from engrammar.tables.released.convert import import_tables, read_names

    made = import_tables(model, out, read_names(names) if names else None)
    for layer, table in made.tables.items():
        print(f"table {layer}: {table.num_rows:,} rows of {table.width} values in {made.encoding}")


def export(
    tables: Positional[Path], model: Positional[Path], out: Positional[Path], /, names: Path | None = None
) -> None:
    """Write a copy of a released model with other rows in its tables.

    Args:
        tables: A folder of tables, in the encoding of the model's files.
        model: The folder of the release; config.json and the files that hold the tables are enough.
        out: The new folder.
        names: As for import.
    """
    from engrammar.tables.released.convert import export_tables, read_names

    export_tables(tables, model, out, read_names(names) if names else None)
    print(f"{out}: {model} with the rows of {tables}")


def plan(
    model: Positional[str],
    corpus: Positional[str],
    out: Positional[Path],
    /,
    tokenizer: Path | None = None,
    tokens: int = 500_000,
    prompt_tokens: int = 2048,
    machine: Path | None = None,
    hit_rate: float | None = None,
    tokens_per_s: float | None = None,
    cache: Path = Path("data"),
    json_output: Json = False,
) -> None:
    """Estimate what serving a model's tables costs: hit rates by cache size, bytes, tokens/s by tier, rows to pin.

    Args:
        model: A checkpoint, a folder of tables, the name of a preset, or a released Qwen4-Exp model, of which
            config.json is enough.
        corpus: Text like that to be served: a file or folder, pocket:NAME, hf:NAME, or a folder of tokens.
        out: Folder for plan.json and plan.png, and for the rows to pin if the model has no table files.
        tokenizer: Folder of the tokenizer; by default the model's own, or that of the folder of tokens.
        tokens: The most tokens to read.
        prompt_tokens: The most tokens of a prompt; longer documents are cut.
        machine: JSON with those of ram_rows_per_s, disk_reads_per_s, remote_rows_per_s and compute_tokens_per_s that
            are known; without it, the speeds of RAM and of the disk that holds out are measured.
        hit_rate: Also find the smallest cache with this hit rate.
        tokens_per_s: Also find, for each tier, the smallest cache that is this fast.
        cache: Folder of fetched corpora.
    """
    from engrammar.config import row_bytes
    from engrammar.planning import plan as planning
    from engrammar.planning.report import describe, write_plan
    from engrammar.planning.speeds import Speeds, measure_speeds
    from engrammar.planning.touches import read_sample
    from engrammar.tables.shards import MEMORY
    from engrammar_lab.machine import describe_run

    speeds = Speeds.read(machine) if machine else None
    chosen = planning.find_tokenizer(model, corpus, tokenizer)
    addresses = planning.Addresses.of_model(model, chosen)
    sample = read_sample(corpus, chosen, num_tokens=tokens, prompt_tokens=prompt_tokens, cache=cache)
    studied = planning.study(addresses, sample)
    memory = addresses.memory
    out.mkdir(parents=True, exist_ok=True)
    speeds = speeds or measure_speeds(row_bytes(memory.row_encoding, memory.head_dim), out)
    made = planning.make_plan(
        memory, studied, speeds, wanted_hit_rate=hit_rate, wanted_tokens_per_s=tokens_per_s
    ) | describe_run(f"engrammar table plan {model} {corpus}")
    paths = write_plan(made, studied, out, Path(model) if (Path(model) / MEMORY).is_file() else out)
    print(json.dumps(made, indent=1) if json_output else "\n".join([describe(made), "", *map(str, paths)]))


def upload(
    folder: Positional[Path], name: Positional[str], /, address: str = "127.0.0.1:50051", metadata: str = "P2PHANDSHAKE"
) -> None:
    """Send a folder's tables into a Mooncake pool; pieces that are there already are not sent again.

    Args:
        folder: A checkpoint, or a folder of tables.
        name: Name of the tables in the pool; the table of layer L becomes NAME/L.
        address: Address of mooncake_master, as HOST:PORT.
        metadata: Metadata server of the pool; P2PHANDSHAKE needs none.
    """
    from engrammar.stores.mooncake.pool import PoolServer
    from engrammar.stores.mooncake.upload import upload as send
    from engrammar.tables.folder import open_tables

    opened, server = open_tables(folder), PoolServer(address=address, metadata=metadata)
    for layer, table in opened.tables.items():
        sent = send(table, f"{name}/{layer}", server, geometry=opened.geometry)
        print(f"{name}/{layer}: {table.num_rows:,} rows of {table.row_bytes} bytes, {sent} pieces sent")


def _show(made: "Converted") -> None:
    tables = made.tables.tables.values()
    num_bytes = sum(table.num_rows * table.row_bytes for table in tables)
    num_files = sum(len(table.shards) for table in tables)
    print(f"{made.tables.path}: {num_bytes:,} bytes of rows in {made.tables.encoding}, in {num_files} files")


COMMANDS = by_name(info, pack, quantize, import_, export, plan, upload)
