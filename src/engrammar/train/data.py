"""Text to tokens, once: documents -> tokenizer -> flat binary shards that training reads by memory map."""

import contextlib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerFast

from engrammar.tables.sealed import check_writable, written_beside
from engrammar.train.documents import Split, find_division, find_files, is_kept, read_documents
from engrammar.train.duplicates import near_duplicates
from engrammar.train.recipe import DataRecipe
from engrammar.vocabulary import load_tokenizer

FORMAT_VERSION = 1
SHARD_TOKENS = 64 * 2**20
PAD, END = "<|pad|>", "<|end|>"
PREPARE_AGAIN = "delete the folder and prepare it again"


def train_tokenizer(documents: Iterable[str], *, vocab_size: int, path: Path) -> None:
    """Trains a byte-level BPE of at most `vocab_size` tokens and saves it at `path` as a transformers tokenizer.

    Id 0 is <|pad|> and id 1 is <|end|> (eos and bos). The same documents give the same files, byte for byte.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and 2 special tokens need at least 258")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, bos_token=END)
    fast.save_pretrained(path)


def _load_tokenizer(name: str | Path) -> Any:
    tokenizer = load_tokenizer(name)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name} needs a fast version (tokenizer.json) and an eos token: give another")
    return tokenizer


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One binary file of token ids."""

    file: str
    num_tokens: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """The size of one split, in documents, tokens and UTF-8 bytes of raw text, and its shards."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """A folder of tokenized text: tokens.json, the shards that it lists, and the tokenizer that made them."""

    path: Path
    dtype: str
    vocab_size: int
    pad_id: int
    tokenizer_sha256: str
    settings: dict[str, Any]  # the settings of `prepare`: a second call must have the same
    splits: dict[str, SplitInfo]
    num_repeated: int = 0  # near-duplicates that were left out

    @classmethod
    def open(cls, path: Path) -> "TokenSet":
        """Reads tokens.json and checks that each shard is there with its full size.

        Raises:
            ValueError: tokens.json cannot be read or used, or a shard is missing or has another size.
        """
        file = path / "tokens.json"
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            if fields.pop("format") != FORMAT_VERSION:
                raise ValueError("another format version")
            for name, info in fields["splits"].items():
                fields["splits"][name] = SplitInfo(**info | {"shards": tuple(Shard(**s) for s in info["shards"])})
            tokens = cls(path=path, **fields)
            itemsize = np.dtype(tokens.dtype).itemsize
        except OSError as error:
            raise ValueError(f"cannot read {file} ({error.strerror}): name a folder that `prepare` made") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} cannot be used ({error!r}): {PREPARE_AGAIN}") from error
        for shard_file, shard in tokens._shards():
            size = shard_file.stat().st_size if shard_file.is_file() else 0
            if size != (expected := shard.num_tokens * itemsize):
                raise ValueError(f"{shard_file} is {size} bytes long or missing, not {expected}: {PREPARE_AGAIN}")
        return tokens

    def _shards(self) -> Iterator[tuple[Path, Shard]]:
        return ((self.path / shard.file, shard) for info in self.splits.values() for shard in info.shards)

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer"

    def num_tokens(self, split: Split) -> int:
        return self.splits[split].num_tokens

    def num_bytes(self, split: Split) -> int:
        """The UTF-8 bytes of the raw text, the denominator of bits per byte."""
        return self.splits[split].num_bytes

    def verify(self) -> None:
        """Raises a ValueError unless each shard still has the SHA-256 that was recorded when it was written."""
        for path, shard in self._shards():
            if (found := _file_sha256(path)) != shard.sha256:
                raise ValueError(f"{path} has sha256 {found}, not {shard.sha256}: {PREPARE_AGAIN}")

    def read(self, split: Split, start: int, stop: int) -> np.ndarray:
        """The tokens start..stop-1 of a split as int64, across shards; nothing else is read from the disk."""
        parts, first = [], 0
        for shard in self.splits[split].shards:
            low, high = max(start - first, 0), min(stop - first, shard.num_tokens)
            if low < high:
                offset = low * np.dtype(self.dtype).itemsize
                parts.append(np.fromfile(self.path / shard.file, self.dtype, count=high - low, offset=offset))
            first += shard.num_tokens
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def blocks(self, split: Split, length: int) -> "Blocks":
        """A map-style torch dataset of blocks of `length` tokens; see `Blocks`."""
        blocks = Blocks(self, split, length)
        if length < 2 or not len(blocks):
            raise ValueError(
                f"{split} of {self.path} ({self.num_tokens(split)} tokens) has no block of {length} tokens"
            )
        return blocks


@dataclass(frozen=True)
class Blocks:
    """Blocks of one split as {"input_ids", "labels"}, int64 [length]; picklable, since each read opens the file.

    For training the blocks are consecutive, and a last partial one is dropped. For validation each block begins with
    the last token of the one before, so the shift inside a causal LM's loss scores every token except the very first
    exactly once. The last block is padded with label -100, and "attention_mask" marks the real tokens.
    """

    tokens: TokenSet
    split: Split
    length: int

    def __len__(self) -> int:
        num_tokens = self.tokens.num_tokens(self.split)
        if self.split == "train":
            return num_tokens // self.length
        return max(0, -(-(num_tokens - 1) // (self.length - 1)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * (self.length if self.split == "train" else self.length - 1)
        ids = torch.from_numpy(self.tokens.read(self.split, start, start + self.length))
        if self.split == "train":
            return {"input_ids": ids, "labels": ids.clone()}
        padding = (0, self.length - len(ids))
        return {
            "input_ids": F.pad(ids, padding, value=self.tokens.pad_id),
            "labels": F.pad(ids, padding, value=-100),
            "attention_mask": F.pad(torch.ones_like(ids), padding),
        }


def prepare(recipe: DataRecipe, *, out: Path, cache: Path) -> TokenSet:
    """Tokenizes a source into the folder `out`, or reuses the folder if it was made with the same settings.

    Without a tokenizer, one is trained on the text for training. The folder appears whole or not at all.

    Args:
        recipe: what to read and how to divide it; `sequence_length`, `batch_size` and `folder` are not used.
        out: a new or empty folder, or one that an earlier call made.
        cache: the folder of downloaded pocket corpora.

    Raises:
        ValueError: the source or the tokenizer cannot be read, `out` holds something else, or there is too little text.
    """
    given = None if recipe.tokenizer is None else _load_tokenizer(recipe.tokenizer)
    settings = _settings(recipe, given)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _reuse(out, settings)

    def documents() -> Iterator[str]:
        texts = read_documents(recipe.source, cache=cache, text_field=recipe.text_field)
        if recipe.keep_share < 1:
            texts = (text for text in texts if is_kept(text, recipe.keep_share))
        texts = itertools.islice(texts, recipe.limit_documents)
        return (text for position, text in enumerate(texts) if position not in repeated)

    repeated: set[int] = set()
    if recipe.similarity is not None:
        repeated = near_duplicates(documents(), recipe.similarity)
    check_writable(out.parent)
    with contextlib.suppress(FileExistsError), written_beside(out) as partial:
        partial.mkdir()
        division = find_division(documents, recipe.validation_share)
        if given is None:
            texts = (text for split, text in division.divide(documents()) if split == "train")
            train_tokenizer(texts, vocab_size=recipe.vocab_size, path=partial / "tokenizer")
            given = _load_tokenizer(partial / "tokenizer")
        else:
            given.save_pretrained(partial / "tokenizer")
        fields = _write_tokens(division.divide(documents()), given, partial)
        fields |= {"format": FORMAT_VERSION, "settings": settings, "num_repeated": len(repeated)}
        (partial / "tokens.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")
    return _reuse(out, settings)


def _settings(recipe: DataRecipe, tokenizer: Any) -> dict[str, Any]:
    """The settings that decide the tokens, as they are kept in tokens.json."""
    files = [] if recipe.source.startswith(("pocket:", "hf:")) else find_files(recipe.source)
    listing = [(path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {
        "source": recipe.source,
        "files_sha256": _text_sha256(json.dumps(listing)),  # changes when a file is added, removed or rewritten
        "text_field": recipe.text_field,
        "tokenizer_sha256": tokenizer and _text_sha256(tokenizer.backend_tokenizer.to_str()),
        "vocab_size": None if tokenizer else recipe.vocab_size,
        "validation_share": recipe.validation_share,
        "limit_documents": recipe.limit_documents,
        **({} if recipe.keep_share == 1 else {"keep_share": recipe.keep_share}),
        **({} if recipe.similarity is None else {"similarity": recipe.similarity}),
    }


def _reuse(out: Path, settings: dict[str, Any]) -> TokenSet:
    if not (out / "tokens.json").exists():
        raise ValueError(f"{out} holds other files and no tokens.json: choose an empty or a new output folder")
    tokens = TokenSet.open(out)
    old = tokens.settings
    keys = {**old, **settings}
    changed = [f"{k} was {old.get(k)!r}, now {settings.get(k)!r}" for k in keys if old.get(k) != settings.get(k)]
    if changed:
        raise ValueError(f"{out} was made with other settings ({'; '.join(changed)}): choose another folder")
    return tokens


def _write_tokens(texts: Iterator[tuple[Split, str]], tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Writes the shards of both splits and returns the fields of tokens.json."""
    fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    fast.no_truncation()
    fast.no_padding()
    fast.encode_special_tokens = True  # a document that spells <|end|> holds those characters, not the token
    dtype = "uint16" if len(tokenizer) < 2**16 else "uint32"
    num_documents, num_tokens, num_bytes = Counter[str](), Counter[str](), Counter[str]()
    progress = iter(tqdm(texts, desc="tokenizing", unit=" documents", delay=2))
    while batch := list(itertools.islice(progress, 64)):
        ids: dict[str, list[int]] = {"train": [], "validation": []}
        encodings = fast.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
        for (split, text), encoding in zip(batch, encodings):
            ids[split] += [*encoding.ids, tokenizer.eos_token_id]
            num_documents[split] += 1
            num_bytes[split] += len(text.encode("utf-8"))
        for split in ids:
            _append(np.array(ids[split], dtype), folder, split, num_tokens[split])
            num_tokens[split] += len(ids[split])
    splits = {}
    for split in ("train", "validation"):
        files = sorted(folder.glob(f"{split}-*.bin"))
        shards = [Shard(f.name, f.stat().st_size // np.dtype(dtype).itemsize, _file_sha256(f)) for f in files]
        splits[split] = asdict(SplitInfo(num_documents[split], num_tokens[split], num_bytes[split], tuple(shards)))
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # never scored
    return {
        "dtype": dtype,
        "vocab_size": len(tokenizer),
        "pad_id": pad_id,
        "tokenizer_sha256": _text_sha256(tokenizer.backend_tokenizer.to_str()),
        "splits": splits,
    }


def _append(ids: np.ndarray, folder: Path, split: str, num_before: int) -> None:
    """Adds tokens after the `num_before` already written, and opens a new shard whenever one is full."""
    while len(ids):
        number, num_in_shard = divmod(num_before, SHARD_TOKENS)
        part, ids = np.split(ids, [SHARD_TOKENS - num_in_shard])
        with (folder / f"{split}-{number:05d}.bin").open("ab") as file:
            file.write(part.tobytes())
        num_before += len(part)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
