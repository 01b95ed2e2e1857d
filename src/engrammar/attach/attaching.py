"""Attaches memories to a model, switches them off, and takes them away again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engrammar.addressing import derive_geometry
from engrammar.attach.attached import AttachedMemory, Place
from engrammar.attach.blocks import PATCHES, Decoder, device_of, find_decoder, host_of, is_plain, measure
from engrammar.attach.fingerprints import fingerprint_of
from engrammar.attach.folder import write_adapter
from engrammar.attach.passes import HOME, Attachment, own_parameters
from engrammar.config import Geometry, MemoryConfig, check_choice, check_setting
from engrammar.tables.shards import is_table
from engrammar.vocabulary import compress_vocabulary, fingerprint, require_tokenizer

Trained = Literal["memory", "joint"]
_counting = Lock()  # held while `disabled` blocks are counted
# Text whose residual streams are measured. Their size hardly depends on the text.
SAMPLE = """A memory is looked up by the last few tokens of a text. What it finds is added to the residual stream of a
language model, whose size differs from block to block: it is measured here, once, on these two sentences."""


def attach(
    model: nn.Module,
    config: MemoryConfig | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    name: str = "default",
) -> nn.Module:
    """Attaches a memory to a causal language model of transformers, in place.

    Nothing changes at first, since all rows are zero. The model's own parameters are frozen (`set_trainable`).

    Args:
        model: the model, with its weights; it may be wrapped by PEFT.
        config: the memory's settings, or a dict of settings over a dialect; `layers` are the model's decoder blocks.
        tokenizer: the model's tokenizer.
        name: what the memory is called in this model.

    Returns:
        The model that was given.

    Raises:
        ValueError: the model has no decoder blocks that can be found, or has a memory of that name; or the settings do
            not fit the model or the tokenizer.
    """
    require_tokenizer(tokenizer)
    memory = config if isinstance(config, MemoryConfig) else MemoryConfig.from_json(config)
    decoder = find_decoder(model)
    check_name(decoder.host, name)
    vocab_size = decoder.vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} ids, the model {vocab_size}: give the model's own tokenizer."
        )
    memory.check_model(len(decoder.blocks), len(tokenizer))
    classes_V, geometry = _classes(memory, tokenizer, vocab_size)
    sizes = measure(decoder, _sample(tokenizer, device_of(decoder.module)))
    for layer in memory.layers:
        if not 0 < sizes[layer][1] < float("inf"):
            raise ValueError(
                f"The residual stream at block {layer} has size {sizes[layer][1]}: load the model's weights first."
            )
    place = Place(
        num_ids=len(tokenizer),
        tokenizer_sha256=fingerprint(tokenizer),
        vocab_size=vocab_size,
        hidden_size=decoder.hidden_size,
        num_branches=sizes[0][0],
        scales=tuple(sizes[layer][1] for layer in memory.layers),
    )
    attached = AttachedMemory(memory, geometry, place)
    if classes_V is not None:
        attached.memory.set_classes(classes_V)
    put(decoder, attached, name)
    return model


def put(decoder: Decoder, attached: AttachedMemory, name: str) -> None:
    """Makes a memory part of a model, each fusion on the device of its block. The first one freezes the model."""
    for layer in attached.config.layers:
        attached.fusions[str(layer)].to(device_of(decoder.blocks[layer]))
    attached.memory.to(device_of(decoder.module))
    attachment = attachment_of(decoder.host)
    is_first = attachment is None
    if attachment is None:
        attachment = Attachment()
        decoder.host.add_module(HOME, attachment)
    attachment[name] = attached
    attachment.hook(decoder)
    if is_first:
        decoder.host.save_pretrained = partial(_save_pretrained, decoder.host)  # type: ignore[assignment]
        attachment.trained = [p for p in own_parameters(decoder.host, attachment) if p.requires_grad]
        set_trainable(decoder.host, "memory")


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Takes the memory `name` away (None: all); without any, the model is as it was, to the bit.

    Its parameters can be trained if they could be before.

    Raises:
        ValueError: the model has no such memory, or a patch replaces rows of it.
    """
    attachment = require_attachment(model, name)
    names = list(attachment) if name is None else [name]
    patched = [memory for memory, _ in getattr(getattr(host_of(model), PATCHES, None), "overlays", ())]
    for one in names:
        if attachment.memories()[one].memory in patched:
            raise ValueError(f"A patch replaces rows of the memory {one!r}: undo the patch first.")
    for one in names:
        del attachment[one]
        del attachment.closed[one]
    decoder = find_decoder(model)
    attachment.hook(decoder)
    if not len(attachment):
        trained = {id(parameter) for parameter in attachment.trained}
        for parameter in own_parameters(decoder.host, attachment):
            parameter.requires_grad_(id(parameter) in trained)
        delattr(decoder.host, HOME)
        del decoder.host.save_pretrained
    return model


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Switches the memory `name` (None: all) off inside a `with` block, in every thread: the model is then its base.

    A cache that was filled while a memory was off cannot be continued with it on, nor the other way round. A memory is
    on again when the last of several such blocks has ended, in whatever order they end.

    Raises:
        ValueError: the model has no such memory.
    """
    attachment = require_attachment(model, name)
    memories = list(attachment.values()) if name is None else [attachment[name]]
    names = list(attachment) if name is None else [name]
    with _counting:
        attachment.closed.update(names)
    try:
        yield
    finally:
        with _counting:  # not those that were detached meanwhile, nor what took their names
            attachment.closed.subtract(
                one for one, memory in zip(names, memories) if one in attachment and attachment[one] is memory
            )


def set_trainable(model: nn.Module, what: Trained) -> None:
    """Says what is trained.

    "memory": every attached memory, and not the model's own weights. "joint": both. Weights that PEFT added stay as
    they are. (PEFT freezes everything else when it wraps a model: call this afterwards.)

    Raises:
        ValueError: the model has no memory; or its own weights are quantized and cannot be trained.
    """
    check_choice("what", what, Trained)
    attachment = require_attachment(model, None)
    attachment.requires_grad_(True)
    own = own_parameters(host_of(model), attachment)
    if what == "joint" and not all(map(is_plain, own)):
        raise ValueError("The model's own weights are quantized, so only the memory can be trained: set 'memory'.")
    for parameter in own:
        parameter.requires_grad_(what == "joint")


def _save_pretrained(
    host: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """The `save_pretrained` of a model with memory: the base as it would be without, each memory in a folder beside it.

    The memory `name` is in `engrammar/name`, for `load_attached`. From a `state_dict` it takes its values as the base
    does; rows that are placed outside the model are read where they are.

    Raises:
        ValueError: `push_to_hub` is asked for, which would leave the memories out; or `state_dict` lacks a memory.
    """
    if push_to_hub:
        raise ValueError("push_to_hub would leave the memories out: save to a folder, and upload that.")
    decoder, memories = find_decoder(host), require_attachment(host, None).memories()
    given = {name: _values_of(name, memory, state_dict) for name, memory in memories.items()}
    save_base(host, save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
    for name, attached in memories.items():
        source = attached.memory.source
        gives_rows = source is not None and not source.is_first  # to the first rank, which waits for them
        if is_main_process or gives_rows:
            write_adapter(Path(save_directory, HOME, name), name, attached, fingerprint_of(decoder), given[name])


def _values_of(
    name: str, attached: AttachedMemory, state_dict: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor] | None:
    """The values of a memory in the model's `state_dict`."""
    if state_dict is None:
        return None
    mine = f"{HOME}.{name}."
    given = {key.removeprefix(mine): value for key, value in state_dict.items() if key.startswith(mine)}
    is_placed = attached.memory.source is not None
    missing = [key for key in attached.state_dict() if key not in given and not (is_placed and is_table(key))]
    if missing:
        raise ValueError(f"state_dict lacks {mine}{missing[0]}: give that of the whole model, or none.")
    return given


def save_base(
    host: nn.Module, save_directory: str | Path, state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
) -> None:
    """The `save_pretrained` of a model with memory as it would be without."""
    given = host.state_dict() if state_dict is None else state_dict
    own = {key: value for key, value in given.items() if not key.startswith(f"{HOME}.")}
    type(host).save_pretrained(host, save_directory, state_dict=own, **kwargs)  # type: ignore[attr-defined]


def attachment_of(model: nn.Module) -> Attachment | None:
    """All memories of a model; None if it has none."""
    found = getattr(host_of(model), HOME, None)
    return found if isinstance(found, Attachment) else None


def require_attachment(model: nn.Module, name: str | None) -> Attachment:
    """All memories of a model; raises a ValueError if there is none, or none called `name`."""
    attachment = attachment_of(model)
    if attachment is None:
        raise ValueError(f"This {type(model).__name__} has no memory attached: call attach or load_attached first.")
    if name is not None and name not in attachment:
        raise ValueError(f"This model has no memory {name!r}; it has {', '.join(attachment)}.")
    return attachment


def only_memory(model: nn.Module, name: str | None) -> tuple[str, AttachedMemory]:
    """The memory `name` (None: the only one) and its name; raises a ValueError if there is none, or no only one."""
    attachment = require_attachment(model, name)
    if name is None and len(attachment) > 1:
        raise ValueError(f"This model has the memories {', '.join(attachment)}: name one of them.")
    name = next(iter(attachment)) if name is None else name
    return name, attachment.memories()[name]


def check_name(host: nn.Module, name: str) -> None:
    """Raises a ValueError if a memory cannot have this name in this model."""
    attachment = attachment_of(host)
    if attachment is None and hasattr(host, HOME):
        raise ValueError(f"{type(host).__name__} has an attribute {HOME!r} of its own: no memory can be attached.")
    if attachment is not None and name in attachment:
        raise ValueError(f"This model has a memory {name!r}: detach it, or choose another name.")
    plain = name.isidentifier() and not hasattr(Attachment(), name)
    check_setting("name", name, plain, "letters, digits and _, and no attribute of a module")


def _classes(
    memory: MemoryConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[torch.Tensor | None, Geometry]:
    """The class of each id, if the memory compresses the vocabulary, and the geometry."""
    if memory.compression == "none":
        return None, derive_geometry(memory, num_classes=vocab_size, fill_class=memory.fill_id)
    classes_V = torch.from_numpy(compress_vocabulary(tokenizer))
    chosen = {"num_classes": int(classes_V.max()) + 1, "fill_class": int(classes_V[memory.fill_id])}
    return classes_V, derive_geometry(memory, **chosen)


def _sample(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> torch.Tensor:
    ids = tokenizer(SAMPLE, return_tensors="pt").input_ids
    if ids.shape[1] < 2:
        raise ValueError("The tokenizer makes fewer than two tokens of a text: give the model's own tokenizer.")
    return ids.to(device)
