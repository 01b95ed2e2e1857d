"""Applies patches to a running model, and takes them back: no weight and no file is changed.

Letters: V ids of the tokenizer.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engrammar.attach.blocks import (
    PATCHES,
    REFUSED,
    Decoder,
    device_of,
    evaluating,
    find_decoder,
    first_parameters,
    hidden_of,
    host_of,
)
from engrammar.attach.fingerprints import check_base
from engrammar.config import Encoding, check_choice
from engrammar.edit.building import refuse_conflicts
from engrammar.edit.checking import check_patch
from engrammar.edit.files import patch_digest, read_patch, refuse, value_table
from engrammar.edit.overlay import TableOverlay, check_tables
from engrammar.edit.passes import EditHooks
from engrammar.edit.patch import Patch, addressing_digest, classes_digest, joined
from engrammar.edit.rows import ArrayStore, ValueRows
from engrammar.edit.sequences import Reach
from engrammar.edit.stack import Stack, sharing_places, stack_patches
from engrammar.memory import Memory
from engrammar.stores.base import RowStore
from engrammar.stores.disk import DiskStore
from engrammar.tables.folder import TableFile
from engrammar.vocabulary import compress_vocabulary, fingerprint

Tier = Literal["ram", "disk"]
OnConflict = Literal["refuse", "replace"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Applied:
    """A patch on a model."""

    patch: Patch  # its value rows are in `rows` alone if they are read from a disk
    path: Path | None  # the file that they are read from
    digest: str  # the patch's SHA-256
    rows: ValueRows
    memory: Memory | None  # the memory whose rows it replaces

    def whole(self) -> Patch:
        """The patch with its value rows."""
        return self.patch if self.path is None else read_patch(self.path)


@final
class Edits:
    """The patches of one model, in the order in which they were applied, and those that requests may choose."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.hooks = EditHooks(decoder, final_norm_of(decoder))
        self.applied: list[Applied] = []  # every pass uses them
        self.offered: list[Applied] = []  # a request of a continuous batch uses them if it names them (`offering`)
        self.overlays: dict[tuple[Memory, int], TableOverlay] = {}

    def names(self) -> list[str]:
        return [one.patch.name for one in self.applied]

    def require_free(self, name: str) -> None:
        """Raises a ValueError if a patch of this name is applied or offered."""
        for patches, what in ((self.applied, "applied"), (self.offered, "offered to requests")):
            if name in [one.patch.name for one in patches]:
                raise ValueError(f"A patch {name!r} is {what} already: undo it, or give this one another name.")

    def require_one_vocabulary(self, patch: Patch) -> None:
        """Raises a ValueError if a patch knows ids by other classes than one that is applied or offered."""
        for other in (one.patch for one in (*self.applied, *self.offered)):
            has_keys = len(other.entries) and len(patch.entries)
            if has_keys and other.base.classes_sha256 != patch.base.classes_sha256:
                raise ValueError(
                    f"The patch {patch.name!r} is for a tokenizer with other classes of ids ({patch.base.num_ids} ids) "
                    f"than {other.name!r} ({other.base.num_ids} ids), which is on this model: undo that one first."
                )

    def stack_of(self, applied: Sequence[Applied]) -> Stack | None:
        """The exact entries of some patches as one; None if there are none.

        Raises:
            ValueError: patches do not fit each other, or the model has no final norm to write before.
        """
        exact = [one for one in applied if len(one.patch.entries)]
        if not exact:
            return None
        identity = tuple(one.digest for one in exact)
        patches, rows = [one.patch for one in exact], [one.rows for one in exact]
        stack = stack_patches(patches, rows, identity)
        if stack.blocks[-1] >= len(self.hooks.places):
            raise ValueError(
                f"{type(self.decoder.module).__name__} has no final norm that could be found, and "
                f"{exact[-1].patch.name!r} writes there: write at one of its {len(self.decoder.blocks)} blocks."
            )
        return stack

    def set(self, applied: list[Applied], offered: list[Applied]) -> None:
        """Makes these the patches of the model; an error leaves the model as it was."""
        stack = self.stack_of(applied)
        alone = [self.stack_of([one]) for one in offered]
        reach = Reach.of([one for one in (stack, *alone) if one is not None]) if offered else None
        kept = {*applied, *offered}
        gone = [one.rows.store for one in (*self.applied, *self.offered) if one not in kept]
        wanted: dict[tuple[Memory, int], list[Any]] = {place: [] for place in self.overlays}
        encodings: dict[Memory, Encoding] = {}
        for one in applied:
            for layer, delta in one.patch.deltas.items():
                assert one.memory is not None and one.patch.tables is not None
                wanted.setdefault((one.memory, layer), []).append(delta)
                encodings[one.memory] = one.patch.tables.encoding
        for place, deltas in wanted.items():
            overlay = self.overlays.setdefault(place, TableOverlay(place[0].table(place[1])))
            overlay.show(joined(deltas) if deltas else None, encodings.get(place[0]))
            if not deltas:
                del self.overlays[place]
        self.applied, self.offered = applied, offered
        self.hooks.place(stack, gone, reach)


def apply_patch(
    model: nn.Module,
    patch: Patch | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    memory: Tier | Callable[[TableFile], RowStore] = "ram",
    on_conflict: OnConflict = "refuse",
) -> nn.Module:
    """Applies a patch to a model, in place, beside those that are applied. Weights and files stay as they are.

    The next pass sees it. A cache that was filled before is refused, since its keys and values are of other edits. (Not
    where a patch only replaces rows, nor once the last patch is undone: begin with a new cache.)

    Args:
        model: the model that the patch is for; a memory may be attached to it, PEFT may have wrapped it.
        patch: a patch, or the file of one.
        tokenizer: the model's tokenizer; it may be left out if the model has a memory, or another patch.
        memory: where value rows are read: "ram"; "disk", or a function that opens a store, for the file of a patch.
        on_conflict: what happens where another patch changes the same differently. "refuse": an error names each key
            and row; "replace": this patch counts as long as it is applied.

    Returns:
        The model that was given.

    Raises:
        ValueError: the patch is damaged, or for another model, tokenizer or tables; its name is taken; or it is in
            conflict with another one. The model is then as it was.
    """
    check_choice("on_conflict", on_conflict, OnConflict)

    def add(edits: Edits, one: Applied) -> None:
        if on_conflict == "refuse":
            refuse_beside(one, edits.applied)
        edits.set([*edits.applied, one], edits.offered)

    add_patch(model, patch, tokenizer, memory, add)
    return model


def add_patch(
    model: nn.Module,
    patch: Patch | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    memory: Tier | Callable[[TableFile], RowStore],
    add: Callable[[Edits, Applied], None],
) -> None:
    """Reads and checks a patch, and gives it to `add`, with the patches of the model.

    Raises:
        ValueError: as `apply_patch`, but for conflicts; or as `add`. The model is then as it was.
    """
    if not callable(memory):
        check_choice("memory", memory, Tier)
    path = None if isinstance(patch, Patch) else Path(patch)
    patch = patch if isinstance(patch, Patch) else read_patch(patch)
    check_patch(patch, refuse(patch.name))
    decoder = find_decoder(model)
    check_base(decoder, patch.base.model, f"The patch {patch.name!r}")
    edits = edits_of(model)
    is_new = edits is None
    edits = Edits(decoder) if edits is None else edits
    edits.require_free(patch.name)
    edits.require_one_vocabulary(patch)
    classes_V, before_V = _classes(patch, edits, tokenizer), edits.hooks.classes_V
    held = None if not patch.deltas else _memory(patch, decoder)
    one = _with_rows(patch, path, memory, held)
    try:
        edits.hooks.classes_V = classes_V
        add(edits, one)
    except BaseException:
        edits.hooks.classes_V = before_V
        one.rows.store.close()
        raise
    if is_new:
        setattr(decoder.host, PATCHES, edits)


def undo_patch(model: nn.Module, patch: Patch | str | None = None) -> nn.Module:
    """Takes a patch back, in any order (None: all). What remains is as if it had never been applied, to the bit.

    Args:
        patch: the patch or its name.

    Returns:
        The model that was given.

    Raises:
        ValueError: no such patch is applied.
    """
    edits = _require_edits(model)
    name = patch.name if isinstance(patch, Patch) else patch
    if name is not None and name not in edits.names():
        raise ValueError(f"No patch {name!r} is applied; applied are {', '.join(edits.names())}.")
    edits.set([one for one in edits.applied if name is not None and one.patch.name != name], edits.offered)
    forget_edits(model)
    return model


def forget_edits(model: nn.Module) -> None:
    """Leaves nothing of patches on a model that has none."""
    edits = edits_of(model)
    if edits is not None and not edits.applied and not edits.offered:
        delattr(host_of(model), PATCHES)


def applied_patches(model: nn.Module) -> list[str]:
    """The names of the patches of a model, in the order in which they were applied."""
    edits = edits_of(model)
    return [] if edits is None else edits.names()


@contextmanager
def without_patches(model: nn.Module) -> Iterator[None]:
    """Switches exact entries off inside a `with` block, in every thread; row deltas stay.

    They are on again when the last of several such blocks has ended, in whatever order they end. A cache that was
    filled with patches is not continued without them.

    Raises:
        ValueError: no patch is applied.
    """
    hooks = _require_edits(model).hooks
    with hooks.lock:
        hooks.closed += 1
    try:
        yield
    finally:
        with hooks.lock:
            hooks.closed -= 1


@contextmanager
def unpatched(model: nn.Module) -> Iterator[None]:
    """`without_patches`, where a model may also have none, and in evaluation: how facts are learned."""
    with without_patches(model) if applied_patches(model) else nullcontext(), evaluating(host_of(model)):
        yield


def edits_of(model: nn.Module) -> Edits | None:
    """The patches of a model; None if it has none."""
    return getattr(host_of(model), PATCHES, None)


def _require_edits(model: nn.Module) -> Edits:
    edits = edits_of(model)
    if edits is None:
        raise ValueError(f"No patch is applied to this {type(model).__name__}.")
    return edits


def _classes(patch: Patch, edits: Edits, tokenizer: Any) -> NDArray[np.int32]:
    """The class of each id, of the tokenizer or of what the model knows."""
    base = patch.base
    if tokenizer is not None:
        classes_V = compress_vocabulary(tokenizer)
        for what, found, wanted in (
            ("vocabulary", fingerprint(tokenizer), base.tokenizer_sha256),
            ("classes of ids", classes_digest(classes_V), base.classes_sha256),
        ):
            if found != wanted:
                raise ValueError(
                    f"The patch {patch.name!r} is for a tokenizer with another {what} ({base.num_ids} ids there, "
                    f"{len(classes_V)} here): give the tokenizer that it was made with."
                )
        return classes_V.astype(np.int32)
    known = [edits.hooks.classes_V.astype(np.int64)]
    for memory in memories_of(edits.decoder.host):
        if memory.class_of_id is not None and memory.config.compression == "normalized":
            known.append(memory.class_of_id[: memory.num_ids].cpu().numpy())
    for classes_V in known:
        if classes_digest(classes_V) == base.classes_sha256:
            return classes_V.astype(np.int32)
    if not len(patch.entries):
        return edits.hooks.classes_V
    raise ValueError(f"Give the model's tokenizer: the classes of ids that {patch.name!r} is for are not known here.")


def memories_of(host: nn.Module) -> list[Memory]:
    """The memories of a causal LM, its own and attached ones."""
    return [module for module in host.modules() if isinstance(module, Memory)]


def _memory(patch: Patch, decoder: Decoder) -> Memory:
    """The memory whose rows a patch replaces."""
    assert patch.tables is not None
    memories = memories_of(decoder.host)
    if not memories:
        raise ValueError(f"The patch {patch.name!r} replaces rows of tables, and this model has no memory.")
    wanted = patch.tables.addressing_sha256
    fits = [memory for memory in memories if addressing_digest(memory.config, memory.geometry) == wanted]
    if len(fits) > 1:
        raise ValueError(
            f"{len(fits)} memories of this model have the tables that {patch.name!r} is for: detach others."
        )
    memory = fits[0] if fits else memories[0]
    check_tables(patch, memory)
    return memory


def refuse_beside(one: Applied, applied: Sequence[Applied]) -> None:
    """Raises a ValueError if patches change something that this one changes differently."""
    for index, last in sharing_places([*[other.patch for other in applied], one.patch]):
        if last == len(applied):
            refuse_conflicts(applied[index].whole(), one.whole())


def _with_rows(
    patch: Patch, path: Path | None, memory: Tier | Callable[[TableFile], RowStore], replaced: Memory | None
) -> Applied:
    """A patch and its value rows, in memory or where they are read from its file."""
    digest = patch_digest(patch)
    if memory == "ram" or not len(patch.values):
        path = None
        store: RowStore = ArrayStore(f"the values of {patch.name}", digest, patch.values)
    elif path is None:
        raise ValueError(
            f"memory is {memory!r}, which reads value rows from a file: write the patch, and give its path."
        )
    else:
        store = memory(value_table(path)) if callable(memory) else DiskStore(value_table(path))
        patch = replace(patch, values=np.broadcast_to(np.zeros((1, 1), np.uint8), patch.values.shape))
    rows = ValueRows(store=store, encoding=patch.encoding)
    return Applied(patch=patch, path=path, digest=digest, rows=rows, memory=replaced)


@torch.no_grad()
def final_norm_of(decoder: Decoder) -> nn.Module | None:
    """The module whose output is the decoder's last hidden state; None if there is none. It takes a pass of two ids.

    Raises:
        ValueError: a block does not read hidden states.
    """
    embeddings: Any = decoder.host.get_input_embeddings()  # type: ignore[operator]
    sample = torch.zeros(1, 2, dtype=torch.long, device=device_of(embeddings))
    called: list[tuple[nn.Module, Any, Any]] = []
    own_thread = threading.get_ident()  # others may be using the model

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() == own_thread:
            called.append((module, hidden_of(first_parameters(module)[0], args, kwargs), output))

    parts = [child for child in decoder.module.children() if not isinstance(child, nn.ModuleList)]
    hooks = [part.register_forward_hook(record, with_kwargs=True) for part in [*decoder.blocks, *parts]]
    try:
        with evaluating(decoder.host):
            last = decoder.module(input_ids=sample, use_cache=False)[0]
    finally:
        for hook in hooks:
            hook.remove()
    read = [hidden for module, hidden, _ in called if any(module is block for block in decoder.blocks)]
    for hidden in read:
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != sample.shape or hidden[0, 0].numel() % last.shape[-1]:
            raise ValueError(f"The blocks of {type(decoder.module).__name__} do not read hidden states: {REFUSED}")
    for module, hidden, left in reversed(called):
        is_last = isinstance(left, Tensor) and left.data_ptr() == last.data_ptr() and left.numel() == last.numel()
        if is_last and isinstance(hidden, Tensor) and hidden.shape == last.shape and module not in decoder.blocks:
            return module
    return None
