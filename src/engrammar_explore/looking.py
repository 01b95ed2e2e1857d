"""What a model does with a text: its tokens, the gates of its memories, its guesses with and without, and of each token
the n-grams, their rows, and what they promote. Everything is a dict of plain JSON.

Letters: T tokens, M residual branches, D hidden width, E width of a token's rows, H columns, V vocabulary.
"""

import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engrammar.addressing import look_back
from engrammar.attach.blocks import device_of, find_decoder, host_of
from engrammar.edit import applied_patches
from engrammar.edit.applying import edits_of, final_norm_of
from engrammar.memory import Memory
from engrammar_explore.census import Census
from engrammar_explore.pieces import encode, token_text
from engrammar_explore.traffic import Traffic
from engrammar_explore.watching import Compare, Recorded, comparisons, places_of, switched_off, watching

CHUNK = 64  # tokens whose probabilities are taken at once


@dataclass(frozen=True, kw_only=True)
class LookSettings:
    """How a text is looked at."""

    most_tokens: int = 512  # longer texts are refused
    num_guesses: int = 8  # next tokens with the highest probability, with and without
    num_promoted: int = 8  # tokens that a value promotes most, and least
    # What is off in the second pass; "first" is the first of `comparisons`, None makes no second pass.
    compare: Compare | Literal["first"] | None = "first"


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What is found out of a model once."""

    norm: nn.Module  # its final norm
    traffic: Traffic  # the counts of what its tables are asked

    @classmethod
    def of(cls, model: nn.Module) -> "Known":
        return cls(norm=final_norm(model), traffic=Traffic(model))

    def close(self) -> None:
        """Leaves the model as it was."""
        self.traffic.close()


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """A text that a model has read, and what was recorded. `overview` and `closer` tell of it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    settings: LookSettings
    text: str
    # Of each token, its text, and which part of it it is if several tokens make one character.
    pieces: list[tuple[str, int]]
    ids_T: Tensor  # its ids
    # Logits with everything on, and with `compare` off (None: nothing is off).
    logits_TV: Tensor
    without_TV: Tensor | None
    compare: Compare | None
    recorded: list[Recorded]  # of each memory layer
    norm: nn.Module  # the model's final norm
    traffic: list[dict[str, Any]]  # `Traffic.take` of the pass with everything on
    seconds: dict[str, float]  # of the pass, and of the one without


def look(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    settings: LookSettings = LookSettings(),
    census: Census | None = None,
) -> dict[str, Any]:
    """Looks at a text as a whole, and at each of its tokens.

    Args:
        model: any causal language model of transformers or ours, in evaluation, with or without memories and patches.
        census: which n-grams of a corpus share rows.

    Returns:
        `overview` of the text, and under "details" what `closer` returns of each token.

    Raises:
        ValueError: the text has no token, or too many; or there is nothing of that kind to compare with.
    """
    seen = see(model, tokenizer, text, settings)
    return overview(seen) | {"details": [closer(seen, place, census) for place in range(len(seen.ids_T))]}


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # compiled code does not notice hooks
def see(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    settings: LookSettings = LookSettings(),
    known: Known | None = None,
) -> Seen:
    """Passes a text through a model, and once more with `settings.compare` off. Errors are as in `look`.

    Args:
        known: what is known of the model from earlier looks.
    """
    if known is None:
        with closing(Known.of(model)) as known:
            return see(model, tokenizer, text, settings, known)
    ids, pieces = encode(tokenizer, text, settings.most_tokens)
    allowed = comparisons(model)
    first = allowed[0] if allowed else None
    compare = first if settings.compare == "first" else settings.compare
    ids_BT = torch.tensor([ids], device=device_of(model))
    known.traffic.take()
    started = time.perf_counter()
    with watching(places_of(model)) as recorded:
        logits_TV = logits_of(model, ids_BT)
    ended = time.perf_counter()
    traffic = known.traffic.take()
    seconds, without_TV = {"with": ended - started}, None
    if compare is not None:
        with switched_off(model, compare):
            without_TV = logits_of(model, ids_BT)
        seconds["without"] = time.perf_counter() - ended
    return Seen(
        model=model,
        tokenizer=tokenizer,
        settings=settings,
        text=text,
        pieces=pieces,
        ids_T=ids_BT[0].cpu(),
        logits_TV=logits_TV,
        without_TV=without_TV,
        compare=compare,
        recorded=recorded,
        norm=known.norm,
        traffic=traffic,
        seconds=seconds,
    )


def logits_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """The logits [T, V] of one text, in fp32 on the CPU."""
    return model(input_ids=ids_BT, use_cache=False).logits[0].float().cpu()


@torch.no_grad()
def overview(seen: Seen) -> dict[str, Any]:
    """The text as a whole.

    Returns:
        "text"; "tokens", each with "id", "text", "part" and, if there was a second pass, "change": the divergence of
        the next token's distribution from that without, in nats; "memories", each with "name", "layer", "gates" [T][M]
        and "added", the norm of what is added as a share of the stream's, [T]; "compare"; "patches", the names of those
        applied; "traffic" of the first pass; "milliseconds" of both; "notes".
    """
    tokens: list[dict[str, Any]] = [
        {"id": int(token_id), "text": text, "part": part} for token_id, (text, part) in zip(seen.ids_T, seen.pieces)
    ]
    if seen.without_TV is not None:
        for token, change in zip(tokens, divergence(seen.logits_TV, seen.without_TV).tolist()):
            token["change"] = change
    memories = [
        {
            "name": one.place.name,
            "layer": one.place.layer,
            "gates": one.gate_TM.tolist(),
            "added": (one.added_T / one.stream_T.clamp_min(1e-30)).tolist(),
        }
        for one in seen.recorded
    ]
    return {
        "text": seen.text,
        "tokens": tokens,
        "memories": memories,
        "compare": seen.compare,
        "comparisons": comparisons(seen.model),
        "patches": applied_patches(seen.model),
        "traffic": seen.traffic,
        "milliseconds": {name: 1000 * seconds for name, seconds in seen.seconds.items()},
        "notes": _notes(seen),
    }


def divergence(logits_TV: Tensor, others_TV: Tensor) -> Tensor:
    """KL(with || without) of the next token at each position, in nats; [T]."""
    parts = []
    for one, other in zip(logits_TV.split(CHUNK), others_TV.split(CHUNK)):
        first, second = one.log_softmax(-1), other.log_softmax(-1)
        parts.append((first.exp() * (first - second)).sum(-1).clamp_min(0.0))
    return torch.cat(parts)


def _notes(seen: Seen) -> list[str]:
    notes = []
    if not seen.recorded:
        notes.append("This model has no memory: there are no gates and no rows. Patches change it all the same.")
    edits = edits_of(seen.model)
    replacing = [] if edits is None else [one.patch.name for one in edits.applied if one.patch.deltas]
    if replacing and seen.compare in ("patches", "both"):
        notes.append(f"Rows that {', '.join(replacing)} replaces stay replaced in the comparison: undo it to see both.")
    return notes


@torch.no_grad()
def closer(seen: Seen, place: int, census: Census | None = None) -> dict[str, Any]:
    """One token of a text.

    Returns:
        "position"; "guesses" of the next token, each with "id", "text", "with" and, if there was a second pass,
        "without" (probabilities), the most likely ones of either; "next", the same of the token that follows;
        "memories", each with "name", "layer", "gates" [M], "value" (its norm), "silent", "promotes" and "demotes" (the
        final norm and the output head applied to the value: "id", "text", "score", a logit), and "orders": the "words"
        of the n-gram, whether it is "whole" or begins before the text, its "share" of the value (its part's length in
        the value's direction; the shares and the bias add up to 1), its "count" in the census, and its "rows".

    Raises:
        ValueError: the text has no such token.
    """
    if not 0 <= place < len(seen.ids_T):
        raise ValueError(f"There is no token {place}; the text has {len(seen.ids_T)}.")
    guesses, following = _guesses(seen, place)
    return {
        "position": place,
        "guesses": guesses,
        "next": following,
        "memories": [_of_memory(seen, one, place, census) for one in seen.recorded],
    }


def _guesses(seen: Seen, place: int) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The likeliest next tokens, and the one that follows; None at the end of the text."""
    columns = {"with": seen.logits_TV[place].softmax(-1)}
    if seen.without_TV is not None:
        columns["without"] = seen.without_TV[place].softmax(-1)
    number = min(seen.settings.num_guesses, len(columns["with"]))
    chosen = dict.fromkeys(token for column_V in columns.values() for token in column_V.topk(number).indices.tolist())

    def told(token: int) -> dict[str, Any]:
        probabilities = {name: float(column_V[token]) for name, column_V in columns.items()}
        return {"id": token, "text": token_text(seen.tokenizer, token), **probabilities}

    likely = [told(token) for token in sorted(chosen, key=lambda token: -float(columns["with"][token]))]
    return likely, told(int(seen.ids_T[place + 1])) if place + 1 < len(seen.ids_T) else None


def _of_memory(seen: Seen, one: Recorded, place: int, census: Census | None) -> dict[str, Any]:
    value_D = one.value_TD[place]
    size = float(value_D.norm())
    found: dict[str, Any] = {
        "name": one.place.name,
        "layer": one.place.layer,
        "gates": one.gate_TM[place].tolist(),
        "silent": not bool(one.gate_TM[place].any()),
        "value": size,
        "added": float(one.added_T[place]),
        "orders": _orders(seen, one, place, census),
        "promotes": [],
        "demotes": [],
    }
    if size > 0.0:
        scores_V = promoted(seen.model, seen.norm, value_D)
        number = min(seen.settings.num_promoted, len(scores_V))
        for name, sign in (("promotes", 1), ("demotes", -1)):
            best = (sign * scores_V).topk(number).indices.tolist()
            found[name] = [
                {"id": token, "text": token_text(seen.tokenizer, token), "score": float(scores_V[token])}
                for token in best
            ]
    return found


def promoted(model: nn.Module, norm: nn.Module, value_D: Tensor) -> Tensor:
    """The logits [V] of a value by itself: the final norm and the output head applied to it."""
    head: Any = host_of(model).get_output_embeddings()  # type: ignore[operator]
    # Their `forward`, since hooks of patches on the norm are for passes.
    return head.forward(norm.forward(value_D.to(head.weight))).float().cpu()


def final_norm(model: nn.Module) -> nn.Module:
    """The norm before a model's output head.

    Raises:
        ValueError: there is none that can be found.
    """
    decoder = find_decoder(model)
    edits = edits_of(model)
    norm = final_norm_of(decoder) if edits is None else next(iter(edits.hooks.places[len(decoder.blocks) :]), None)
    if norm is None:
        raise ValueError(f"{type(decoder.host).__name__} has no norm before its head that could be found.")
    return norm


def _orders(seen: Seen, one: Recorded, place: int, census: Census | None) -> list[dict[str, Any]]:
    """The n-gram of each order that ends at a token: its words, rows, their norms, and who shares them."""
    memory = one.place.memory
    config, width = memory.config, memory.config.head_dim
    window_BT = seen.ids_T[None, max(0, place + 1 - config.max_ngram_size) : place + 1]  # nothing earlier is read
    device = "cpu" if memory.class_of_id is None else memory.class_of_id.device
    rows_H = memory.addresses(window_BT.to(device))[one.place.layer][0, -1].tolist()
    seen_N = _seen_ids(memory, window_BT)
    weight_DE = one.place.fusion.projection.weight.detach().float().cpu()[: one.place.fusion.hidden_size]
    embedding_HC, value_D = one.embedding_TE[place].view(-1, width), one.value_TD[place]
    square = float(value_D.square().sum())
    found = []
    for index, order in enumerate(config.orders):
        columns = range(index * config.num_heads, (index + 1) * config.num_heads)
        is_whole = all(token >= 0 for token in seen_N[:order])
        words = [seen.pieces[place - back][0] for back in range(order) if seen_N[back] >= 0][::-1]
        part = slice(columns[0] * width, (columns[-1] + 1) * width)
        rows = [
            {"row": rows_H[column], "head": column - columns[0], "norm": float(embedding_HC[column].norm())}
            for column in columns
        ]
        if census is not None and is_whole:
            classes = census.classes_of(seen_N[:order][::-1])
            for row, column in zip(rows, columns):
                row["shared"] = census.sharing(one.place.layer, column, classes)
        found.append(
            {
                "order": order,
                "words": words,
                "whole": is_whole,
                "share": float(weight_DE[:, part] @ one.embedding_TE[place, part] @ value_D / square)
                if square
                else 0.0,
                "count": census.count(classes) if census is not None and is_whole else None,
                "rows": rows,
            }
        )
    return found


def _seen_ids(memory: Memory, ids_BT: Tensor) -> list[int]:
    """The ids that the last token sees 0, 1, ..., N-1 positions back, -1 where there is none."""
    plain_V = torch.arange(max(int(ids_BT.max()) + 1, memory.num_ids))
    geometry = replace(memory.geometry, fill_class=-1)
    return [int(one[0, -1]) for one in look_back(ids_BT, config=memory.config, geometry=geometry, classes_V=plain_V)]
