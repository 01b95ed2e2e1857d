"""Documents: where text is read from, and which part of it is for training or for validation."""

import glob
import hashlib
import importlib
import itertools
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from engrammar.train import corpora

SUFFIXES = (".txt", ".jsonl", ".parquet")
TEXT = "give .txt or .jsonl files"
# Up to 1,000 characters, cut after a line that ends in the second half, else after a word, else anywhere.
PIECE = re.compile(r".{500,1000}\n|.{1,1000}(?:\s|$)|.{1,1000}", re.DOTALL)

Split = Literal["train", "validation"]
logger = logging.getLogger(__name__)


def read_documents(source: str, *, cache: Path, text_field: str = "text") -> Iterator[str]:
    """Yields the documents of a source in a fixed order; documents without any text are left out.

    Args:
        source: a file, folder or glob of .txt (one document per file), .jsonl or .parquet; `pocket:wiki+gcide`; or
            `hf:NAME[:CONFIG]`, the train split of a Hugging Face dataset.
        cache: the folder of downloaded pocket corpora.
        text_field: the field that holds the text.

    Raises:
        ValueError: something cannot be read.
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
    """The files of a file name, folder or glob, in order; raises a ValueError if one is not text, or none exists."""
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    else:
        found = [path] if path.exists() else sorted(map(Path, glob.glob(source, recursive=True)))
    if not found or any(p.suffix not in SUFFIXES or not p.is_file() for p in found):
        raise ValueError(f"no text at {source}: give {', '.join(SUFFIXES)} files (or a folder), pocket:NAME or hf:NAME")
    return found


def _read_file(path: Path, text_field: str) -> Iterator[Any]:
    parquet: Any = data_library("pyarrow.parquet", f"{path} is read", TEXT) if path.suffix == ".parquet" else None
    try:
        if path.suffix == ".txt":
            yield path.read_bytes().decode("utf-8")
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    if line.strip():
                        yield json.loads(line)[text_field]
        else:
            for batch in parquet.ParquetFile(path).iter_batches(columns=[text_field]):
                yield from batch.column(text_field).to_pylist()
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has a row without the field {text_field!r}: name another text field") from error
    except (ValueError, OSError) as error:  # bad UTF-8, bad JSON, bad parquet, no permission
        raise ValueError(f"cannot read {path} as {path.suffix[1:]}: {error}") from error


def _read_hugging_face(name: str, text_field: str) -> Iterator[Any]:
    datasets = data_library("datasets", f"hf:{name} is read", TEXT)
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


def data_library(name: str, use: str, instead: str) -> ModuleType:
    """Imports a library of the extra `data`; where it lacks, a ValueError says what it is for and what to do."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{use} with {name.partition('.')[0]}, which is not installed: pip install 'engrammar[data]', or {instead}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Division:
    """Which text is for training and which for validation."""

    # What goes to one side as a whole: a document or, if a source has too few documents, a piece of one (`PIECE`).
    unit: Literal["document", "piece"]
    threshold: float  # units whose draw (`_draw`) is below this are for validation

    def split_of(self, unit: str) -> Split:
        """The side of a document or piece, which depends only on its text without differences of case and spacing."""
        return "validation" if _draw(unit, b"") < self.threshold else "train"

    def divide(self, documents: Iterator[str]) -> Iterator[tuple[Split, str]]:
        """Yields every document, or every run of neighboring pieces of a document on the same side, with its side."""
        for document in documents:
            units = [document] if self.unit == "document" else PIECE.findall(document)
            for split, run in itertools.groupby(units, self.split_of):
                text = "".join(run)
                if not text.isspace():
                    yield split, text


def find_division(documents: Callable[[], Iterator[str]], share: float) -> Division:
    """Divides by documents (`is_validation`) or, if that leaves a side empty, by the pieces with the lowest draws.

    Args:
        documents: starts reading the documents from the beginning. They are read until both sides have one.
        share: the share for validation; with 0 every document is for training.

    Raises:
        ValueError: there is no document, or too little text for two pieces.
    """
    by_document = Division(unit="document", threshold=share * 2**64)
    if next(documents(), None) is None:
        raise ValueError("no document of the source is kept: choose a larger keep_share, or a source that is not empty")
    if share == 0:
        return by_document
    num_documents, sides = 0, set()
    for document in documents():
        num_documents += 1
        sides.add(by_document.split_of(document))
        if len(sides) == 2:
            return by_document
    draws = np.unique(
        np.fromiter((_draw(piece, b"") for text in documents() for piece in PIECE.findall(text)), dtype=np.uint64)
    )
    if len(draws) < 2:
        raise ValueError(
            f"validation_share is {share}, but documents ({num_documents}) and different pieces of up to 1,000 "
            f"characters ({len(draws)}) are too few to divide: give more text, or choose validation_share 0"
        )
    num_validation = min(max(round(share * len(draws)), 1), len(draws) - 1)
    logger.warning(
        "Too few documents (%d) for validation_share %s: of %d different pieces of up to 1,000 characters, %d are for "
        "validation.",
        *(num_documents, share, len(draws), num_validation),
    )
    return Division(unit="piece", threshold=int(draws[num_validation - 1]) + 1)


def is_validation(text: str, share: float) -> bool:
    """Whether a document is for validation, which depends only on its normalized text.

    So a document never changes sides when others are added or removed, and copies that differ only in case or spacing
    are on the same side.
    """
    return _draw(text, b"") < share * 2**64


def is_kept(text: str, share: float) -> bool:
    """Whether a document belongs to a share of a corpus; decided like `is_validation`, but independently of it."""
    return _draw(text, b"kept") < share * 2**64


def _draw(text: str, purpose: bytes) -> int:
    """A 64-bit number that depends only on the normalized text and the purpose."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    digest = hashlib.blake2b(normal.encode("utf-8"), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "big")
