"""Documents: where text comes from, and to which side of a division each belongs."""

import glob
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engrammar.train import corpora

SUFFIXES = (".txt", ".jsonl", ".parquet")


def read_documents(source: str, *, cache: Path, text_field: str = "text") -> Iterator[str]:
    """The documents of a source in a fixed order; documents without any text are left out.

    `source` is a file, folder or glob of .txt (one document a file), .jsonl or .parquet; `pocket:wiki+gcide`; or
    `hf:NAME[:CONFIG]`, the train split of a Hugging Face dataset. Raises ValueError for anything that cannot be read.
    """
    kind, _, name = source.partition(":")
    if kind == "pocket":
        texts: Iterator[Any] = (entry.text for entry in corpora.entries(name, cache=cache))
    elif kind == "hf":
        texts = _read_hugging_face(name, text_field)
    else:
        texts = itertools.chain.from_iterable(_read_file(path, text_field) for path in find_files(source))
    empty = True
    for position, text in enumerate(texts):
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):  # half a surrogate pair has no UTF-8 form
            raise ValueError(f"document {position} of {source} is not text in its field {text_field!r}: {text!r:.80}")
        if text and not text.isspace():
            empty = False
            yield text
    if empty:
        raise ValueError(f"{source} holds no text: name a source with at least one document that is not empty")


def find_files(source: str) -> list[Path]:
    """The files that a file, folder or glob names, in order; a ValueError where one cannot be read as text."""
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    else:
        found = [path] if path.exists() else sorted(map(Path, glob.glob(source, recursive=True)))
    if not found or any(p.suffix not in SUFFIXES or not p.is_file() for p in found):
        raise ValueError(f"no text at {source}: give {', '.join(SUFFIXES)} files (or a folder), pocket:NAME or hf:NAME")
    return found


def _read_file(path: Path, text_field: str) -> Iterator[Any]:
    try:
        if path.suffix == ".txt":
            yield path.read_bytes().decode("utf-8")
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    if line.strip():
                        yield json.loads(line)[text_field]
        else:
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=[text_field]):
                yield from batch.column(text_field).to_pylist()
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has a row without the field {text_field!r}: name another text field") from error
    except (ValueError, OSError) as error:  # bad UTF-8, bad JSON, bad parquet, no permission
        raise ValueError(f"cannot read {path} as {path.suffix[1:]}: {error}") from error


def _read_hugging_face(name: str, text_field: str) -> Iterator[Any]:
    import datasets

    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split="train", streaming=True)
        for row in rows:
            if text_field not in row:
                raise ValueError(f"its fields are {', '.join(row)}, and {text_field!r} is not one")
            yield row[text_field]
    except Exception as error:  # datasets raises many kinds: no network, unknown name, a config to choose
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read the dataset {name!r} from Hugging Face: {reason}") from error


def is_validation(text: str, share: float) -> bool:
    """Whether a document belongs to validation: a function of its own normalized text and of nothing else.

    So it never changes sides when others come or go, and copies that differ in case or spacing stay together.
    """
    return _draw(text, b"") < share * 2**64


def is_kept(text: str, share: float) -> bool:
    """Whether a document belongs to a share of a corpus: by its own text, as `is_validation`, and independent of it."""
    return _draw(text, b"kept") < share * 2**64


def _draw(text: str, purpose: bytes) -> int:
    """A number of 64 bits that depends on the normalized text and the purpose alone."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    digest = hashlib.blake2b(normal.encode("utf-8"), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "big")
