"""The one door to learning: facts become a patch by one of the methods, and those that cannot are refused by name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from torch import nn

from engrammar.edit.facts import Fact, Refused, as_fact
from engrammar.edit.gated import GatedSettings, learn_gated
from engrammar.edit.hashed import RowSettings, learn_rows
from engrammar.edit.patch import Patch
from engrammar.edit.vector import VectorSettings, learn_vector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Method = Literal["gated", "vector", "rows"]
Settings = GatedSettings | VectorSettings | RowSettings
Learner = Callable[[nn.Module, Any, Sequence[Fact], str, Any], tuple[Patch, list[Refused]]]
METHODS: Mapping[Method, tuple[Learner, type[Settings]]] = {
    "gated": (learn_gated, GatedSettings),
    "vector": (learn_vector, VectorSettings),
    "rows": (learn_rows, RowSettings),
}


class Learned(NamedTuple):
    """What `learn` returns: the patch, and the facts that are not in it, each with the reason."""

    patch: Patch
    refused: list[Refused]


def learn(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
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
        facts: facts, or dicts with subject, prompt, object and, if there are any, paraphrases; as `read_facts` returns.
        name: what the patch is called in a model.
        method: "gated" writes the object where a probe of the relation opens, without a gradient. "vector" adds an
            optimized value wherever the subject occurs. "rows" writes into rows of the model's hashed table that the
            subject's n-grams read, which other engines can serve.
        settings: of the method; None for its defaults.

    Raises:
        ValueError: no fact can be written (the first reason is given), or an argument is not allowed.
    """
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; allowed: {', '.join(get_args(Method))}.")
    learner, kind = METHODS[method]
    if settings is not None and not isinstance(settings, kind):
        raise ValueError(f"settings are {type(settings).__name__}; method {method!r} takes {kind.__name__}.")
    wanted = [fact if isinstance(fact, Fact) else as_fact(fact) for fact in facts]
    return Learned(*learner(model, tokenizer, wanted, name, kind() if settings is None else settings))
