"""Reads and writes `memory.json`, which describes a folder's rows. Everything in it is checked before it is used."""

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from engrammar.config import Encoding, Geometry, MemoryConfig
from engrammar.tables import checksums
from engrammar.tables.encodings import ENCODING_OF, PLAIN
from engrammar.tables.headers import AGAIN, Requirement, is_count, load_json, read_header, read_json
from engrammar.tables.sealed import PARTIAL
from engrammar.tables.shards import INDEX, MEMORY, model_files, weight_map

VERSION = 1
KEYS = ("version", "memory", "geometry", "num_ids", "tokenizer_sha256", "encoding", "source", "tables", "crc32")
MOST_BYTES = 16 * 2**20


def read_memory(folder: Path) -> dict[str, Any]:
    """Reads a folder's memory.json and checks everything in it except `tables`.

    Raises:
        ValueError: the file is missing or damaged; names the file, what is wrong with it, and what to do.
    """
    path = folder / MEMORY
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a checkpoint, or a folder of table files.")
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {MEMORY}, so it holds no table files: give another folder, or, where an older version "
            f"wrote this checkpoint, `engrammar table pack {folder} NEW` makes one with it."
        )
    require = Requirement(path)
    try:
        require(path.stat().st_size <= MOST_BYTES, f"it has more than {MOST_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {AGAIN}") from error
    if (folder / checksums.MANIFEST).is_file():
        manifest = checksums.read_manifest(folder)
        try:
            if MEMORY in manifest.files:
                checksums.check_file(folder, manifest, MEMORY)
        except ValueError:
            require(False, f"it is not the one that {checksums.MANIFEST} lists")
    content = load_json(data, require)
    check_content(content, require)
    return content


def write_memory(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes `content`, which has all KEYS except version and crc32, as the memory.json of a folder.

    Its checksum detects, for instance, a flipped digit of a multiplier, which would be another valid memory.
    """
    content = {"version": VERSION, **content}
    content["crc32"] = checksums.json_sum(content)
    check_content(content, Requirement(folder / MEMORY))
    (folder / MEMORY).write_text(json.dumps(content, indent=1) + "\n")


def check_content(content: Any, require: Requirement) -> None:
    """Checks all fields except `tables`."""
    require(isinstance(content, dict), "it is not an object")
    require(content.get("version") == VERSION, f"its version is {content.get('version')!r}, not {VERSION}")
    require(content.keys() == set(KEYS), f"its keys are {', '.join(content)}, not {', '.join(KEYS)}")
    checksums.require_sum(content, require)
    memory, geometry = memory_of(content["memory"], require), geometry_of(content["geometry"], require)
    try:
        geometry.check(memory)
    except ValueError as error:
        require(False, f"geometry: {error}")
    num_ids, sha256 = content["num_ids"], content["tokenizer_sha256"]
    require(num_ids is None or (is_count(num_ids) and num_ids > 0), f"num_ids is {num_ids!r}")
    is_hash = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)
    require(sha256 is None or is_hash, f"tokenizer_sha256 is {sha256!r}")
    require(content["encoding"] in get_args(Encoding), f"encoding is {content['encoding']!r}")
    require(isinstance(content["source"], str), "source is no text")
    layers, tables = [str(layer) for layer in memory.layers], content["tables"]
    require(isinstance(tables, dict) and tables.keys() == set(layers), f"tables are not of layers {', '.join(layers)}")


def memory_of(data: Any, require: Requirement) -> MemoryConfig:
    """The memory settings in `data`; all of them must be there."""
    names = {field.name for field in fields(MemoryConfig)}
    require(isinstance(data, dict) and data.keys() == names, f"memory does not have the settings {sorted(names)}")
    try:
        return MemoryConfig(**data)
    except (ValueError, TypeError, OverflowError) as error:
        require(False, str(error))
        raise AssertionError from error


def geometry_of(data: Any, require: Requirement) -> Geometry:
    """The geometry in `data`."""
    names = {field.name for field in fields(Geometry)}
    require(isinstance(data, dict) and data.keys() == names, f"geometry does not have the settings {sorted(names)}")

    def check(value: Any, name: str, depth: int) -> None:
        if depth:
            require(isinstance(value, list), f"geometry.{name} is not lists of integers")
            for part in value:
                check(part, name, depth - 1)
        else:
            require(is_count(value, 2**63 - 1), f"geometry.{name} has {value!r}, which is no row or class")

    for name in names:
        check(data[name], name, {"multipliers": 2, "table_sizes": 3}.get(name, 0))
    require(data["rows_multiple"] >= 1, "geometry.rows_multiple is 0")
    return Geometry.from_json(data)


def describe_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Makes the content of a checkpoint's memory.json from its config.json, index and shards.

    Returns:
        The content; None if the checkpoint has no memory tables, or tables of a dtype that no encoding has (fp16).
    """
    config, index = (folder / name for name in ("config.json", INDEX))
    if not config.is_file() or not index.is_file():
        return None
    settings = read_json(config)
    shards = {
        int(match[1]): (name, shard)
        for name, shard in weight_map(folder).items()
        if (match := re.search(r"memory\.tables\.([0-9]+)\.weight$", name))
    }
    if not shards or settings.get("memory") is None or settings.get("geometry") is None:
        return None
    memory, tables, dtypes = MemoryConfig.from_json(settings["memory"]), {}, set()
    for layer, (name, shard) in sorted(shards.items()):
        (table,) = read_header(folder / shard).values()
        dtypes.add(table.dtype)
        rows, width = table.shape
        files = [{"file": shard, "rows": rows, "crc32": checksums.page_sums_path(folder / shard).name}]
        tables[str(layer)] = {"name": name, "rows": rows, "width": width, "scale": None, "shards": files}
    encoding = ENCODING_OF.get(dtypes.pop())
    if dtypes or encoding not in PLAIN:
        return None
    return {
        "memory": memory.to_json(),
        "geometry": Geometry.from_json(settings["geometry"]).to_json(),
        "num_ids": settings.get("num_ids"),
        "tokenizer_sha256": settings.get("tokenizer_sha256"),
        "encoding": encoding,
        "source": "a checkpoint of engrammar",
        "tables": tables,
    }


def finish_checkpoint(folder: Path) -> None:
    """Gives the checkpoint that was just written into `folder` its memory.json, page checksums and manifest.

    A memory.json that was copied with served tables is kept. In a partial folder the checksums are left to
    `sealed.seal`, which reads every file anyway while training goes on.
    """
    content = None if (folder / MEMORY).exists() else describe_checkpoint(folder)
    if content is not None:
        write_memory(folder, content)
    if not folder.parent.name.startswith(PARTIAL):
        checksums.write_manifest(folder, model_files(folder))
