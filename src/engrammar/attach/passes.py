"""The hooks of an attached model: look ids up as the decoder is called, add rows as a block is called.

Letters: B batch, T tokens, S positions of history.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from engrammar.attach.around import note_ids
from engrammar.attach.attached import AttachedMemory, Owner, first_tokens
from engrammar.attach.blocks import Decoder, first_parameters, hidden_of, with_hidden
from engrammar.attach.inputs import CACHES, Inputs, cache_given, read_inputs
from engrammar.attach.paged import FlatTokens, PagedPass, begin_paged, flat_in
from engrammar.attach.skipping import begin_skipping, end_skipping, restore_blocks
from engrammar.attach.state import MemoryState, keeps_all, positions_in, state_in
from engrammar.memory import Retrieved

HOME = "engrammar"  # the name of the submodule that holds all memories of a model


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of a decoder, from its call to its return."""

    attachment: "Attachment"
    # For each memory that is on, what was retrieved, and its state if later passes may go on from this one.
    reads: Mapping[str, tuple[Retrieved, MemoryState | PagedPass | None]] = field(default_factory=dict)
    keep_all: bool = False  # whether the states keep positions that may be taken back
    cache: Cache | None = None


# The passes that are under way in this thread, the innermost last. A block is called by its model's own code, which
# hands nothing of ours on.
_passes: ContextVar[tuple[Pass, ...]] = ContextVar("engrammar_passes", default=())


@final
class Attachment(nn.ModuleDict):
    """All memories of one model by their names: the submodule `engrammar` of the model."""

    def __init__(self) -> None:
        super().__init__()
        # How many `disabled` contexts are open for each memory, in all threads.
        self.closed: Counter[str] = Counter()
        self.handles: list[RemovableHandle] = []
        self.trained: list[nn.Parameter] = []  # the model's own parameters that were trainable before
        self.arguments: list[str] = []
        # Whether blocks return a tuple of hidden states and nothing else; `keep_prefix` finds out.
        self.blocks_return_tuples = False

    def memories(self) -> dict[str, AttachedMemory]:
        """All memories in the order of their names, in which those of one block add to what it reads."""
        return {name: memory for name, memory in sorted(self.items()) if isinstance(memory, AttachedMemory)}

    def is_off(self, name: str) -> bool:
        """Whether a memory is switched off."""
        return self.closed[name] > 0

    def hook(self, decoder: Decoder) -> None:
        """Places the hooks anew: on the decoder, and on each block that a memory reads at."""
        torch.compiler.reset()  # compiled code does not notice hooks that come or go
        for handle in self.handles:
            handle.remove()
        self.handles = []
        restore_blocks(decoder)
        if not len(self):
            return
        self.arguments = first_parameters(decoder.module)
        self.handles = [
            *note_ids(decoder),
            decoder.host.register_load_state_dict_pre_hook(self.before_load),
            decoder.module.register_forward_pre_hook(self.before_pass, with_kwargs=True),
            decoder.module.register_forward_hook(self.after_pass, always_call=True),
        ]
        layers = sorted({layer for memory in self.memories().values() for layer in memory.config.layers})
        self.handles += [
            decoder.host.register_forward_pre_hook(partial(self.before_call, decoder, layers[0]), with_kwargs=True),
            decoder.host.register_forward_hook(end_skipping, always_call=True),
        ]
        for layer in layers:
            before = partial(self.before_block, layer, decoder.argument)
            self.handles.append(decoder.blocks[layer].register_forward_pre_hook(before, with_kwargs=True))

    def before_load(self, host: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Refuses the weights of the base alone, which is what transformers' Trainer resumes from."""
        own = {id(parameter) for parameter in own_parameters(host, self)}
        for ends in (host.get_input_embeddings(), host.get_output_embeddings()):  # type: ignore[operator]
            if ends is not None:  # adapters of PEFT may hold them
                own -= {id(parameter) for parameter in ends.parameters()}
        base = {f"{prefix}{name}" for name, parameter in host.named_parameters() if id(parameter) in own}
        has_ours = any(name.startswith(f"{prefix}{HOME}.") for name in state_dict)
        if not has_ours and not base.isdisjoint(state_dict):
            raise ValueError(
                "These weights are the base's alone, and the attached memories would stay as they are: resume with "
                "EngrammarTrainer (transformers' Trainer cannot load memories), or call load_attached on the base."
            )

    def before_call(
        self, decoder: Decoder, layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Skips the blocks below the first memory if the pass brings what they would compute (`keep_prefix`)."""
        return begin_skipping(decoder, layer, self.blocks_return_tuples, args, kwargs)

    @torch.compiler.disable
    def before_pass(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Starts reading the rows of this pass."""
        memories = {name: memory for name, memory in self.memories().items() if not self.is_off(name)}
        # A KeyboardInterrupt may have left a pass behind: torch calls no hook after one.
        others = tuple(one for one in _passes.get() if one.attachment is not self)
        begun = Pass(attachment=self)
        given = dict(zip(self.arguments, args)) | kwargs
        check_continues(given, memories)
        tokens = flat_in(given) if memories else None
        if tokens is not None:  # continuous batching
            begun = Pass(attachment=self, reads={n: _read_flat(n, memory, tokens) for n, memory in memories.items()})
        elif memories:
            inputs = read_inputs(decoder, given)
            keep_all = keeps_all(inputs.cache)
            reads = {name: _read(name, memory, inputs, keep_all) for name, memory in memories.items()}
            begun = Pass(attachment=self, reads=reads, keep_all=keep_all, cache=inputs.cache)
        _passes.set((*others, begun))

    @torch.compiler.disable
    def before_block(
        self, layer: int, argument: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Adds to the hidden states of a block what the memories hold for it."""
        current = next((one for one in reversed(_passes.get()) if one.attachment is self), None)
        if current is None:
            if all(map(self.is_off, self)):
                return None
            raise RuntimeError(
                f"Block {layer} was called outside a pass of its model, so the memory does not know its ids: call the "
                "model, or call it in disabled(model). (transformers' own gradient checkpointing recomputes it.)"
            )
        hidden = hidden_of(argument, args, kwargs)
        for name, (retrieved, state) in current.reads.items():
            memory = self.memories()[name]
            if layer in memory.config.layers:
                hidden = memory.add(layer, hidden, retrieved, state, current.keep_all)
        return with_hidden(hidden, argument, args, kwargs)

    @torch.compiler.disable
    def after_pass(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Ends the pass; a cache that it filled gets the memories' states."""
        passes = _passes.get()
        if not passes or passes[-1].attachment is not self:  # it was refused
            return
        ended = passes[-1]
        _passes.set(passes[:-1])
        if output is None:  # it failed
            return
        cache = ended.cache if ended.cache is not None else cache_in(output)
        for name, (_, state) in ended.reads.items():
            if isinstance(state, PagedPass):
                state.state.end(state.tokens)
            elif state is None or cache is None:
                continue
            elif state_in(cache, name) is None and positions_in(cache) in (None, state.seen):
                cache.layers.append(state)


def _read(name: str, memory: AttachedMemory, inputs: Inputs, keep_all: bool) -> tuple[Retrieved, MemoryState | None]:
    """Starts reading the rows of one memory; continues, or begins, its state."""
    state, history_BS = None, None
    masked_BT = inputs.input_ids
    if inputs.mask_BT is not None:
        masked_BT = masked_BT.masked_fill(~inputs.mask_BT, -1)
    if inputs.caches:
        state = continue_state(inputs, memory.begin(name))
        continued = state.seen > 0
        history_BS = state.history(masked_BT, keep_all)
        history_BS = history_BS if continued else None
    retrieved = memory.memory.retrieve(inputs.input_ids, inputs.mask_BT, inputs.position_ids, history_BS)
    first_BT = first_tokens(masked_BT, history_BS, retrieved.starts_BT)
    dead_BT = first_BT | (masked_BT < 0)
    return replace(retrieved, dead_BT=dead_BT if retrieved.dead_BT is None else retrieved.dead_BT | dead_BT), state


def _read_flat(name: str, memory: AttachedMemory, tokens: FlatTokens) -> tuple[Retrieved, PagedPass]:
    """As `_read`, under continuous batching."""
    state, history_BTS = begin_paged(name, memory.config, tokens)
    retrieved = memory.memory.retrieve(tokens.input_ids, tokens.live_T[None], history=history_BTS)
    assert retrieved.dead_BT is not None
    return replace(retrieved, dead_BT=retrieved.dead_BT | (history_BTS[..., -1] < 0)), state


def continue_state(inputs: Inputs, begin: MemoryState) -> MemoryState:
    """The state in the cache that was given, if it is of the same name and config as `begin`; `begin` for a new cache.

    Raises:
        ValueError: the cache holds positions that such a state has not seen.
    """
    state, cache = state_in(inputs.cache, begin.name), inputs.cache
    # A cache without attention layers says only whether it holds earlier positions.
    has_earlier = cache.has_previous_state() if cache is not None and inputs.seen is None else inputs.seen
    if state is None and not has_earlier:
        return begin
    if state is None or state.config != begin.config or inputs.seen not in (None, state.seen):
        held = "none" if state is None or state.config != begin.config else str(state.seen)
        raise ValueError(
            f"The cache holds {inputs.seen or 'some'} positions, and the memory {begin.name!r} has seen {held} of "
            "them: pass a cache that this model filled with this memory attached and on, or a new one."
        )
    return state


def check_continues(given: Mapping[str, Any], memories: Collection[str]) -> None:
    """Raises a ValueError if a cache holds tokens that a memory has seen which is not in this pass."""
    for layer in getattr(cache_given(given), "layers", ()):
        is_ours = isinstance(layer, MemoryState) and isinstance(layer.config, Owner)
        if is_ours and layer.seen and layer.name not in memories:
            raise ValueError(
                f"The cache was filled with the memory {layer.name!r}, which is off or detached now: pass a new cache."
            )


def cache_in(output: Any) -> Cache | None:
    """The cache that a decoder returns."""
    values: Iterable[Any] = output if isinstance(output, tuple) else [getattr(output, name, None) for name in CACHES]
    return next((value for value in values if isinstance(value, Cache) and hasattr(value, "layers")), None)


def own_parameters(host: nn.Module, attachment: Attachment) -> list[nn.Parameter]:
    """The parameters of the base: neither a memory's, nor those that PEFT added."""
    others = {id(parameter) for parameter in attachment.parameters()}
    for module in host.modules():
        for added in getattr(module, "adapter_layer_names", ()):
            if isinstance(layers := getattr(module, added, None), nn.Module):
                others |= {id(parameter) for parameter in layers.parameters()}
    return [parameter for parameter in host.parameters() if id(parameter) not in others]
