"""The one door to learning: facts become a patch by one of the methods, and those that cannot are refused by name."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from engrammar.config import check_choice
from engrammar.edit.applying import edits_of
from engrammar.edit.building import merge
from engrammar.edit.facts import Fact, Refused, as_fact
from engrammar.edit.gated import GatedReader
from engrammar.edit.hashed import learn_rows
from engrammar.edit.patch import Patch, base_of
from engrammar.edit.probing import GatedSettings
from engrammar.edit.solving import RowSettings
from engrammar.edit.units import KeptParts, Part, Unit
from engrammar.edit.vector import VectorSettings, learn_vector

Method = Literal["gated", "vector", "rows"]
Settings = GatedSettings | VectorSettings | RowSettings
SETTINGS: Mapping[Method, type[Settings]] = {"gated": GatedSettings, "vector": VectorSettings, "rows": RowSettings}


class Learned(NamedTuple):
    """What `learn` returns: the patch, and the facts that are not in it, each with the reason."""

    patch: Patch
    refused: list[Refused]


class Request(NamedTuple):
    """Facts to be learned, in units."""

    units: list[Unit]  # what is learned together; learning one takes seconds to a minute
    about: str  # the request as JSON: method, settings, model, facts


def learn(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    facts: Iterable[Fact | Mapping[str, Any]],
    *,
    name: str = "facts",
    method: Method = "gated",
    settings: Settings | None = None,
) -> Learned:
    """Makes a patch that teaches a model facts. The model stays as it is: `apply_patch` applies the patch.

    Patches that are applied meanwhile do not matter.

    Args:
        model: any causal language model of transformers, or ours; in evaluation (`model.eval()`).
        facts: facts, or dicts with subject, prompt, object and, if there are any, paraphrases, which are learned too;
            as `read_facts` returns.
        name: what the patch is called in a model.
        method: "gated" writes the object where a probe of the relation opens, without a gradient. "vector" adds an
            optimized value wherever the subject occurs. "rows" writes into rows of the model's hashed table that the
            subject's n-grams read, which other engines can serve.
        settings: of the method; None for its defaults.

    Raises:
        ValueError: no fact can be written (the first reason is given), or an argument is not allowed.
    """
    return learn_units(request(model, tokenizer, facts, method=method, settings=settings), name=name)


def request(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    facts: Iterable[Fact | Mapping[str, Any]],
    *,
    method: Method = "gated",
    settings: Settings | None = None,
    keep: str | Path | None = None,
) -> Request:
    """As `learn`, without learning yet: `learn_units` does that, and can go on where it was killed.

    Args:
        keep: a folder in which what method "gated" reads for all facts alike is kept, for later requests of the same
            model; a few megabytes, which can be deleted at any time. The patch is the same to the bit.
    """
    check_choice("method", method, Method)
    kind = SETTINGS[method]
    if settings is not None and not isinstance(settings, kind):
        raise ValueError(f"settings are {type(settings).__name__}; method {method!r} takes {kind.__name__}.")
    chosen = kind() if settings is None else settings
    edits = edits_of(model)
    if edits is not None and edits.overlays:
        raise ValueError(
            "Patches that replace rows are applied: undo them, since facts are learned on the table's own."
        )
    wanted = [fact if isinstance(fact, Fact) else as_fact(fact) for fact in facts]
    if not wanted:
        raise ValueError("No fact can be written: none was given.")
    if isinstance(chosen, GatedSettings):
        reader = GatedReader(model, tokenizer, chosen, None if keep is None else Path(keep))
        units = reader.facts_in_units(wanted)
    else:
        learner: Callable[..., Part] = learn_vector if method == "vector" else learn_rows
        units = [Unit(facts=tuple(wanted), learn=partial(learner, model, tokenizer, wanted, chosen))]
    about = {"method": method, "settings": asdict(chosen), "model": asdict(base_of(model, tokenizer))}
    return Request(units, json.dumps({**about, "facts": [asdict(fact) for fact in wanted]}))


def learn_units(request: Request, *, name: str = "facts", folder: str | Path | None = None) -> Learned:
    """Learns what was requested, unit by unit, with a progress bar if it takes more than two seconds.

    Args:
        name: what the patch is called in a model.
        folder: where parts are kept as soon as they are learned; the same request with the same folder goes on from
            there, to the same bits. It can be deleted afterwards.

    Raises:
        ValueError: no fact can be written; the first reason is given. Or the folder is another request's.
        OSError: the disk is full or fails.
    """
    kept = None if folder is None else KeptParts(Path(folder), request.about)
    parts: list[Part] = []
    with tqdm(total=sum(len(unit.facts) for unit in request.units), desc="learning", unit=" facts", delay=2) as bar:
        for unit in request.units:
            parts.append(unit.learn() if kept is None else kept.learn(unit))
            bar.update(len(unit.facts))
    refused = [one for part in parts for one in part.refused]
    patches = [part.patch for part in parts if part.patch is not None]
    if not patches:
        raise ValueError(f"No fact can be written: {refused[0].reason}.")
    if len(patches) == 1:
        return Learned(replace(patches[0], name=name), refused)
    return Learned(replace(merge(name, patches), provenance=patches[0].provenance), refused)
