"""A patch: what is to be changed in what a model remembers, as plain arrays, and the base that it is for.

A patch holds two kinds of entry. An *exact entry* belongs to a key, the classes of a whole subject or phrase, and says
what is added to the residual stream where the key occurs. A *row delta* replaces rows of a hashed table.
Letters: Q keys, K the longest key, E exact entries, J steps of an entry, S steps of all entries, R value rows, D hidden
width, P probes, C centres, U replaced rows of a table, V ids of the tokenizer.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engrammar.attach.blocks import find_decoder
from engrammar.attach.fingerprints import fingerprint_of
from engrammar.config import Encoding, Geometry, MemoryConfig
from engrammar.tables.encodings import decode
from engrammar.vocabulary import compress_vocabulary, fingerprint

MOST_CLASSES, MOST_STEPS, MOST_ARMED = 16, 16, 1024  # of a key; of an entry; tokens that a key stays armed
COLUMNS = (
    "key", "block", "armed", "until_name", "probe", "binding", "relative", "fact", "first_step", "num_steps", "after",
)  # fmt: skip
ARRAYS = (
    "keys", "entries", "strengths", "steps", "values", "probe_blocks", "probe_centres", "centres", "directions",
    "thresholds", "name_ids",
)  # fmt: skip
Require = Callable[[object, str], None]
Key = tuple[int, ...]


@final
@dataclass(frozen=True, kw_only=True, eq=False)  # its arrays cannot be compared with ==
class Probe:
    """A test of the hidden state at a block: it opens where `direction . normalize(hidden - centre) > threshold`.

    Attributes:
        name: what it tests, such as a relation. Entries of one key and block that name one probe are in conflict.
        block: the block whose input it reads; of several residual streams, their mean.
        centre, direction: [D].
    """

    name: str
    block: int
    centre: Tensor
    direction: Tensor
    threshold: float


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ExactEntry:
    """What happens where a key occurs.

    Without a probe, `values[0]` is added at the key's last token. With one, the key is armed there and for `armed`
    tokens after it, and `values[0]` is added at the tokens where the probe opens. Where a step says a token, and that
    token comes next, the next step's value is added at it, and so on: an object of several tokens is written token by
    token. After its last token was said, the fact is not armed any more, until its key occurs again.

    Attributes:
        key: class ids, 1 to 16; the longest key that ends at a token is the one that occurs there.
        block: values are added to the input of this block; the number of blocks stands for the input of the final norm.
        values: [J, D], one for each step.
        gate: what values are multiplied by.
        says: the token of each step, up to J of them; fewer leave the last steps without one.
        relative: whether values are multiplied by the norm of the hidden state too.
        probe: the name of a probe of the patch.
        armed: tokens after the key's last one at which the probe may open.
        until_name: whether another name ends that: the first id after the key that is one of the patch's `name_ids`.
        after: the only id at which the probe may open, such as that of a question mark; None: any.
        binding, binding_threshold: a second direction [D] on the probe's normalized hidden state, for this subject
            alone. Of several armed subjects, the nearest whose probe and binding open is written.
        fact: the index of its fact in `Patch.facts`, or -1.
    """

    key: Key
    block: int
    values: Tensor
    gate: float = 1.0
    says: tuple[int, ...] = ()
    relative: bool = False
    probe: str | None = None
    armed: int = 0
    until_name: bool = False
    after: int | None = None
    binding: Tensor | None = None
    binding_threshold: float = 0.0
    fact: int = -1


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class RowDelta:
    """Rows of one layer's hashed table that are replaced."""

    rows_U: NDArray[np.int64]  # ascending row numbers over the layer's whole table
    stored_US: NDArray[np.uint8]  # the new rows as they are stored
    replaced_U: NDArray[np.uint64]  # the `row_digests` of the rows that they replace


@final
@dataclass(frozen=True, kw_only=True)
class Tables:
    """The hashed tables that row deltas are for."""

    addressing_sha256: str  # `addressing_digest` of the memory
    encoding: Encoding  # how their rows are stored
    width: int  # values of a row
    num_rows: Mapping[int, int]  # rows of each layer's table, by the layer


@final
@dataclass(frozen=True, kw_only=True)
class Base:
    """The model and the tokenizer that a patch is for."""

    tokenizer_sha256: str  # `vocabulary.fingerprint` of the tokenizer
    classes_sha256: str  # `classes_digest` of the class of each id
    num_ids: int  # ids of the tokenizer
    num_classes: int  # the classes that they fall into
    model: Mapping[str, Any]  # `attach.fingerprints.fingerprint_of` the model

    @property
    def num_blocks(self) -> int:
        return int(self.model["blocks"])

    @property
    def hidden_size(self) -> int:
        return int(self.model["hidden_size"])


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """A patch; `building.build_patch` makes one, `files.read_patch` reads one.

    Attributes:
        name: what it is called in a model.
        base: what it is for.
        facts: what it says in words, each a dict such as {"subject": ..., "prompt": ..., "object": ...}.
        provenance: where it comes from: method, settings, date.
        scores: what was measured of it.
        encoding: how value rows are stored.
        probe_names: of each probe.
        tables: what row deltas are for; None without any.
        keys_QK: int32 classes, -1 left of a short key.
        entries: int32 [E, COLUMNS], ascending in `key`. `probe` and `binding` (a value row) are -1 for none.
        strengths: float32 [E, 2], gate and binding threshold.
        steps: int32 [S, 2], value row and the id that is said (-1: none).
        values: uint8 [R, bytes of a row].
        probe_blocks, probe_centres: int32 [P]; the second is a row of `centres`.
        centres: float32 [C, D]; probes mostly share one.
        directions: float32 [P, D].
        thresholds: float32 [P].
        name_ids: uint8 [V / 8], a bit for each id that begins a name, or empty if no entry asks.
        deltas: replaced rows by layer.
    """

    name: str
    base: Base
    facts: Sequence[Mapping[str, str]] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    encoding: Encoding
    probe_names: Sequence[str] = ()
    tables: Tables | None = None
    keys_QK: NDArray[np.int32]
    entries: NDArray[np.int32]
    strengths: NDArray[np.float32]
    steps: NDArray[np.int32]
    values: NDArray[np.uint8]
    probe_blocks: NDArray[np.int32]
    probe_centres: NDArray[np.int32]
    centres: NDArray[np.float32]
    directions: NDArray[np.float32]
    thresholds: NDArray[np.float32]
    name_ids: NDArray[np.uint8]
    deltas: Mapping[int, RowDelta] = field(default_factory=dict)

    def column(self, name: str) -> NDArray[np.int64]:
        """A column of `entries`, [E]."""
        return self.entries[:, COLUMNS.index(name)].astype(np.int64)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by their names in a file."""
        found = {name: getattr(self, "keys_QK" if name == "keys" else name) for name in ARRAYS}
        for layer, delta in self.deltas.items():
            found |= {f"rows.{layer}": delta.rows_U, f"stored.{layer}": delta.stored_US}
            found[f"replaced.{layer}"] = delta.replaced_U
        return found

    def key_of(self, entry: int) -> Key:
        """The class ids of an entry's key."""
        key_K = self.keys_QK[self.entries[entry, 0]]
        return tuple(int(one) for one in key_K[key_K >= 0])

    def decoded(self) -> Tensor:
        """The value rows, [R, D], in fp32."""
        if not len(self.values):
            return torch.empty(0, self.base.hidden_size)
        return decode(torch.from_numpy(self.values), self.base.hidden_size, self.encoding, torch.float32)

    def exact_entries(self) -> list[ExactEntry]:
        """The exact entries as they were given to `build_patch`, values rounded to the encoding."""
        values_RD, found = self.decoded(), []
        for index, row in enumerate(self.entries.tolist()):
            of = dict(zip(COLUMNS, row))
            steps = self.steps[of["first_step"] : of["first_step"] + of["num_steps"]]
            says = steps[:, 1].tolist()
            while says and says[-1] < 0:
                says.pop()
            found.append(
                ExactEntry(
                    key=self.key_of(index),
                    block=of["block"],
                    values=values_RD[torch.from_numpy(steps[:, 0].astype(np.int64))],
                    gate=float(self.strengths[index, 0]),
                    says=tuple(says),
                    relative=bool(of["relative"]),
                    probe=None if of["probe"] < 0 else self.probe_names[of["probe"]],
                    armed=of["armed"],
                    until_name=bool(of["until_name"]),
                    after=None if of["after"] < 0 else of["after"],
                    binding=None if of["binding"] < 0 else values_RD[of["binding"]],
                    binding_threshold=float(self.strengths[index, 1]),
                    fact=of["fact"],
                )
            )
        return found

    def names_V(self) -> NDArray[np.bool_]:
        """Whether each id begins a name, [V]; empty if no entry asks."""
        num_ids = self.base.num_ids if len(self.name_ids) else 0
        return np.unpackbits(self.name_ids, count=num_ids).astype(np.bool_)

    def all_probes(self) -> list[Probe]:
        """The probes as they were given to `build_patch`."""
        pairs = torch.from_numpy(self.probe_pairs())
        numbers = zip(self.probe_names, self.probe_blocks, pairs, self.thresholds)
        return [
            Probe(name=name, block=int(block), centre=pair[0], direction=pair[1], threshold=float(threshold))
            for name, block, pair, threshold in numbers
        ]

    def probe_pairs(self) -> NDArray[np.float32]:
        """The centre and the direction of each probe, [P, 2, D]."""
        return np.stack([self.centres[self.probe_centres], self.directions], axis=1)


def base_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Base:
    """Describes the model and the tokenizer that a patch is for; what is attached to the model does not matter.

    Raises:
        ValueError: the model has no decoder blocks that can be found, or no tokenizer was given.
    """
    classes_V = compress_vocabulary(tokenizer)
    return Base(
        tokenizer_sha256=fingerprint(tokenizer),
        classes_sha256=classes_digest(classes_V),
        num_ids=len(classes_V),
        num_classes=int(classes_V.max()) + 1,
        model=json.loads(json.dumps(fingerprint_of(find_decoder(model)))),
    )


def subject_keys(text: str, tokenizer: PreTrainedTokenizerBase, classes_V: NDArray[np.int64]) -> list[Key]:
    """The keys of a subject or phrase, as it reads with and without a space before it: one or two.

    Args:
        classes_V: `vocabulary.compress_vocabulary` of the tokenizer.

    Raises:
        ValueError: a key would have no token, or more than 16.
    """
    found: list[Key] = []
    for variant in (" " + text.strip(), text.strip()):
        key = tuple(int(classes_V[one]) for one in tokenizer(variant, add_special_tokens=False).input_ids)
        if not 1 <= len(key) <= MOST_CLASSES:
            raise ValueError(
                f"{text!r} has {len(key)} tokens; a key has 1 to {MOST_CLASSES}: give a shorter name of the subject."
            )
        if key not in found:
            found.append(key)
    return found


def value_rows(patch: Patch, entry: int) -> set[int]:
    """The value rows that an entry reads: those of its steps, and its binding."""
    of = dict(zip(COLUMNS, patch.entries[entry].tolist()))
    steps = patch.steps[of["first_step"] : of["first_step"] + of["num_steps"]]
    return {*steps[:, 0].tolist(), of["binding"]} - {-1}


def joined(deltas: Sequence[RowDelta]) -> RowDelta:
    """Several deltas of one layer as one; of two for one row the last one counts."""
    rows = np.concatenate([delta.rows_U for delta in deltas])[::-1]
    rows_U, last = np.unique(rows, return_index=True)
    stored = np.concatenate([delta.stored_US for delta in deltas])[::-1][last]
    replaced = np.concatenate([delta.replaced_U for delta in deltas])[::-1][last]
    return RowDelta(rows_U=rows_U, stored_US=stored, replaced_U=replaced)


def require_same_names(patches: Sequence[Patch]) -> None:
    """Patches must take the same ids for names.

    Raises:
        ValueError: two do not.
    """
    asking = [patch for patch in patches if len(patch.name_ids)]
    for one in asking[1:]:
        if not np.array_equal(one.name_ids, asking[0].name_ids):
            raise ValueError(f"{asking[0].name!r} and {one.name!r} take other ids for names: learn one of them again.")


def classes_digest(classes_V: NDArray[np.int64]) -> str:
    """The SHA-256 of the class of each id."""
    return hashlib.sha256(np.ascontiguousarray(classes_V).astype("<i8").tobytes()).hexdigest()


def addressing_digest(config: MemoryConfig, geometry: Geometry) -> str:
    """The SHA-256 of all that decides which rows an n-gram reads."""
    names = ("layers", "max_ngram_size", "head_dim", "num_heads", "compression", "boundary", "dead_ids", "end_ids")
    chosen = {name: config.to_json()[name] for name in names}
    return hashlib.sha256(json.dumps([chosen, geometry.to_json()], sort_keys=True).encode()).hexdigest()


def row_digests(stored_US: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Eight bytes of the SHA-256 of each stored row."""
    digests = [hashlib.sha256(row.tobytes()).digest()[:8] for row in np.ascontiguousarray(stored_US)]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
