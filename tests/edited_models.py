"""Patches for the tiny models of `attached_models`, and what they do, in plain code."""

import functools
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from attached_models import VOCABULARY, attached_model, base_model, random_ids, tokenizer
from engrammar.attach.blocks import find_decoder, in_branches
from engrammar.edit import ExactEntry, Patch, Probe, apply_patch, base_of, build_patch
from engrammar.edit.applying import final_norm_of
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.vocabulary import compress_vocabulary
from models import tiny_config

WIDTH, BLOCKS, MOST_ARMED = 32, 4, 4
OURS = "engrammar"  # a model of our own with memory
WITH_MEMORY = "llama with memory"


@functools.cache
def classes():
    return compress_vocabulary(tokenizer())


def key(*ids: int) -> tuple[int, ...]:
    return tuple(int(classes()[one]) for one in ids)


def model_of_kind(kind: str, **settings):
    """A model without patches: one of transformers' families, ours (with settings), or one with an attached memory."""
    if kind == WITH_MEMORY:
        return attached_model("llama").requires_grad_(False)
    if kind != OURS:
        return base_model(kind).requires_grad_(False)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "num_classes": int(classes().max()) + 1, "fill_class": int(classes()[2])}
    model = EngrammarForCausalLM(tiny_config("paper", 2, **sizes, **settings)).eval().requires_grad_(False)
    model.model.memory.num_ids = VOCABULARY
    model.model.memory.set_classes(torch.from_numpy(classes()))
    with torch.no_grad():
        for table in model.model.memory.tables.values():
            table.weight.normal_()
    return model


def vectors(seed: int, *shape: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed)) * size


def probes() -> list[Probe]:
    """Two probes that open at about half of all tokens."""
    numbers = {"threshold": 0.0}
    return [
        Probe(name="early", block=1, centre=vectors(1), direction=vectors(2), **numbers),
        Probe(name="late", block=3, centre=vectors(3), direction=vectors(4), **numbers),
    ]


def rich_entries(gate: float = 1.0) -> list[ExactEntry]:
    """Entries of every kind. Keys of one id occur often in `random_ids`."""
    says = (30, 31, 32)  # `spoken_ids` says them
    gated = {"block": BLOCKS, "relative": True, "gate": gate}
    return [
        ExactEntry(key=key(4), block=1, values=vectors(10, 1)),
        ExactEntry(key=key(6, 8), block=2, values=vectors(11, 1), gate=-0.5),
        ExactEntry(key=key(8), block=2, values=vectors(12, 1, size=2.0)),
        ExactEntry(key=key(8), block=0, values=vectors(13, 1)),
        ExactEntry(key=key(10), block=3, values=vectors(14, 3), says=says[:2], relative=True, gate=0.3),
        ExactEntry(key=key(12), values=vectors(15, 3), says=says, probe="early", armed=5, **gated),
        ExactEntry(
            key=key(12), values=vectors(16, 1), says=(33,), probe="late", armed=7, until_name=True, fact=0, **gated
        ),
        ExactEntry(
            key=key(14), values=vectors(17, 2), says=says[:2], probe="late", armed=6, until_name=True, fact=0, **gated
        ),
        ExactEntry(
            key=key(16),
            values=vectors(18, 1),
            probe="late",
            armed=4,
            binding=vectors(19),
            binding_threshold=0.1,
            **gated,
        ),
        ExactEntry(key=key(18, 16), values=vectors(20, 1), probe="early", armed=3, until_name=True, after=16, **gated),
        ExactEntry(key=key(20), values=vectors(21, 1), probe="late", armed=0, block=3),
    ]


def spoken_ids(rows: int, tokens: int, seed: int = 3) -> torch.Tensor:
    """Random ids, in which keys and what entries say occur more often than by chance."""
    ids, draw = random_ids(rows, tokens, seed), torch.Generator().manual_seed(seed + 100)
    phrases = [
        (10, 30, 31),
        (12, 30, 31, 32),
        (6, 8),
        (18, 16),
        (12, 14),
        (14, 30, 31),
        (12, 33),
        (4,),
        (20,),
        (16,),
    ]
    for row in range(rows):
        place = 1
        while place < tokens:
            phrase = phrases[int(torch.randint(len(phrases), (1,), generator=draw))][: tokens - place]
            ids[row, place : place + len(phrase)] = torch.tensor(phrase)
            place += len(phrase) + int(torch.randint(4, (1,), generator=draw))
    return ids


def names() -> np.ndarray:
    """The ids that begin a name: two keys, and some that occur by chance."""
    names_V = np.zeros(len(classes()), np.bool_)
    names_V[[4, 14, 25, 40, 41]] = True
    return names_V


def rich_patch(model, name: str = "rich", gate: float = 1.0, **about) -> Patch:
    about = {"encoding": "fp32", "names_V": names(), "facts": [{"subject": "w12"}], **about}
    return build_patch(name, base_of(model, tokenizer()), rich_entries(gate), probes(), **about)


def small_patch(model, name: str, ids: tuple[int, ...], seed: int = 50, block: int = 2, **about) -> Patch:
    """A patch of one entry without a probe."""
    entry = ExactEntry(key=key(*ids), block=block, values=vectors(seed, 1))
    return build_patch(name, base_of(model, tokenizer()), [entry], encoding="fp32", **about)


ALL, RICH, OTHER, DIRECT = "for_all", "rich", "other", "direct"
CHOICES = [(), (RICH,), (OTHER,), (DIRECT,), (RICH, DIRECT), (OTHER, DIRECT), ()]


def patches_to_choose(model) -> dict[str, Patch]:
    """One that is for all requests; two in conflict with each other; one with longer keys and no probe."""
    longer = [
        ExactEntry(key=key(12, 30), block=1, values=vectors(60, 2, size=2.0), says=(31,)),
        ExactEntry(key=key(10), block=2, values=vectors(61, 1, size=2.0)),
        ExactEntry(key=key(12), block=0, values=vectors(62, 1, size=2.0)),
    ]
    return {
        ALL: small_patch(model, ALL, (4,), block=3),
        RICH: rich_patch(model, RICH),
        OTHER: rich_patch(model, OTHER, gate=-0.7),
        DIRECT: build_patch(DIRECT, base_of(model, tokenizer()), longer, encoding="fp32"),
    }


def edited_model(kind: str, gate: float = 1.0):
    model = model_of_kind(kind)
    return apply_patch(model, rich_patch(model, gate=gate), tokenizer())


def plain_found(entries: list[ExactEntry], ids: list[int]) -> list[tuple[int, ...] | None]:
    """The longest key that ends at each token; a negative id is padding, and no key reaches across it."""
    keys, found = {entry.key for entry in entries}, []
    for place in range(len(ids)):
        best = None
        for length in range(1, place + 2):
            window = ids[place + 1 - length : place + 1]
            if min(window) < 0:
                break
            if key(*window) in keys:
                best = key(*window)
        found.append(best)
    return found


def plain_armed(entries: list[ExactEntry], ids: list[int], found: list, place: int) -> list[tuple[int, int]]:
    """The place of the key and the index of each entry that is armed at a token, the nearest key first.

    Args:
        found: `plain_found` of the ids.
    """
    armed, at = [], place
    for _ in range(MOST_ARMED):
        while at >= 0 and found[at] is None:
            at -= 1
        if at < 0 or min(ids[at : place + 1]) < 0:
            break
        for index, entry in enumerate(entries):
            is_ended = entry.until_name and any(names()[one] for one in ids[at + 1 : place + 1])
            is_here = entry.key == found[at] and place - at <= entry.armed and entry.after in (None, ids[place])
            if entry.probe is not None and is_here and not is_ended:
                armed.append((at, index))
        at -= len(found[at])
    return armed


def plain_writes(entries: list[ExactEntry], ids: list[int], margin) -> list[tuple[int, int, int]]:
    """(token, entry, step) of all that is written in one row.

    Args:
        margin: of a token and an entry with a probe, how far it is open; not open at 0 or below.
    """
    found, writes, before, said = plain_found(entries, ids), [], None, {}

    def fact(index: int) -> int:
        return entries[index].fact if entries[index].fact >= 0 else -1 - index

    for place, token in enumerate(ids):
        is_first = token < 0 or place == 0 or ids[place - 1] < 0
        if is_first:
            before = None
            continue
        for index, entry in enumerate(entries):
            if entry.probe is not None:
                continue
            for step in range(min(len(entry.values), place + 1)):
                spoken = tuple(ids[place - step + 1 : place + 1])
                if found[place - step] == entry.key and spoken == entry.says[:step]:
                    writes.append((place, index, step))
        now = None
        if (
            before is not None
            and before[1] < len(entries[before[0]].says)
            and entries[before[0]].says[before[1]] == token
        ):
            index, step = before
            now = (index, step + 1)
            if step + 1 == len(entries[index].values):
                said[fact(index)], now = place, None
                before = None
                continue
        else:
            opened = [(at, margin(place, index), index) for at, index in plain_armed(entries, ids, found, place)]
            opened = [one for one in opened if one[1] > 0 and said.get(fact(one[2]), -1) < one[0]]
            if opened:
                nearest = max(at for at, *_ in opened)
                now = (max((one for one in opened if one[0] == nearest), key=lambda one: one[1])[2], 0)
        if now is not None:
            writes.append((place, *now))
        before = now
    return writes


@contextmanager
def plainly_patched(model, entries: list[ExactEntry], tests: list[Probe], ids: torch.Tensor):
    """The twin: in this context a full pass of `ids` [B, T], -1 at padding, is edited by hooks of plain loops."""
    decoder, by_name, seen = find_decoder(model), {probe.name: probe for probe in tests}, {}
    norm = final_norm_of(decoder)

    def margin(row: int, place: int, index: int) -> float:
        entry = entries[index]
        probe = by_name[entry.probe]
        unit = F.normalize(seen[probe.block][row, place].mean(0) - probe.centre, dim=0)
        if entry.binding is not None and float(unit @ entry.binding) <= entry.binding_threshold:
            return -1.0
        return float(unit @ probe.direction) - probe.threshold

    def before(block: int, _, args, kwargs):
        hidden = (args or list(kwargs.values()))[0]
        changed = in_branches(hidden, WIDTH).clone()
        seen[block] = changed.clone()
        for row, row_ids in enumerate(ids.tolist()):
            tests_known = max(probe.block for probe in tests) <= block
            for token, index, step in plain_writes(
                entries, row_ids, functools.partial(margin, row) if tests_known else lambda *_: -1.0
            ):
                entry = entries[index]
                if entry.block == block:
                    scale = seen[block][row, token].norm(dim=-1, keepdim=True) if entry.relative else 1.0
                    changed[row, token] += entry.gate * scale * entry.values[step]
        changed = changed.view_as(hidden)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): changed})

    with ExitStack() as stack:
        for block, module in enumerate([*decoder.blocks, norm]):
            hook = module.register_forward_pre_hook(functools.partial(before, block), with_kwargs=True, prepend=True)
            stack.callback(hook.remove)
        yield


def bits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The bits of a whole pass's logits."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float().view(torch.int32)


def everything(model: nn.Module) -> dict:
    """What a model consists of: attributes and hooks of every module, and which parameters are trained."""
    found = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            shown = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else repr(value)
            found[f"{name}:{attribute}"] = shown
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    return found | trained | {"keys": list(model.state_dict())}
