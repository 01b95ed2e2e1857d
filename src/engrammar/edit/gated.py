"""Method "gated": a subject's key arms a fact, a probe of the relation opens it, and its object is written at the end.

Nothing is optimized. The probe is a ridge regression on hidden states of prompts that ask the fact against prompts that
ask something else of the same subjects, and of plain text; the value that writes a token is the direction that raises
its logit the most against all others.
Letters: N prompts, D hidden width, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engrammar.attach.blocks import find_decoder
from engrammar.edit.applying import applied_patches, final_norm_of, without_patches
from engrammar.edit.building import build_patch
from engrammar.edit.facts import Fact, Refused
from engrammar.edit.patch import ExactEntry, Patch, Probe, base_of, subject_keys
from engrammar.edit.states import last_states, text_states
from engrammar.vocabulary import compress_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands before a prompt when a probe is fitted, and what else may be asked of a subject. No test uses them.
BEFORE = ("{}", "Here is a fact. {}", "Nobody disputes this. {}", "As the guide said, {}")
OTHERWISE = (
    "{} is a", "{} is best known for", "Many people like {} because", "The name {} comes from", "{} was first",
    "A short history of {} begins", "The population of {} is", "My friend told me about {}, and",
    "In the year 1990, {}", "The colour of {} is", "It is a long way from here to {}, so",
)  # fmt: skip
NUM_OTHERS, NUM_SUBJECTS = 8, 16  # other relations' templates, and subjects, that a probe is told from
NOT_APART = "prompts that ask it cannot be told from others of its subject"
PLAIN = """The river rises in the hills and flows south for forty miles before it reaches the sea. In spring its
banks are covered with flowers, and farmers bring their cattle down to drink. Two mills once stood near the bridge; both
were closed when the railway came, and today their stones are part of the road. A committee meets every month to decide
how the money of the parish is spent, and its minutes are kept in a cupboard of the town hall. To make the soup, wash
the vegetables, cut them into small pieces, and boil them in salted water for twenty minutes. The function returns the
sum of its arguments, or raises an error if one of them is not a number. She asked whether the train would be late."""


@dataclass(frozen=True, kw_only=True)
class GatedSettings:
    """How facts are written.

    Attributes:
        probe_depth: where probes read, as a share of the depth. Early blocks confuse relations.
        armed: tokens after the subject in which the probe may open.
        strength: the size of a write, in norms of the hidden state before the final norm.
        ridge: of the regression.
        caution: where the probe's threshold stands between other prompts (0) and those that ask (1).
        binding: how much of the way from other subjects' prompts to its own a prompt must be to count as its own.
    """

    probe_depth: float = 0.8
    armed: int = 32
    strength: float = 1.0
    ridge: float = 1e-2
    caution: float = 0.3
    binding: float = 0.5


def learn_gated(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    facts: Sequence[Fact],
    name: str,
    settings: GatedSettings = GatedSettings(),
) -> tuple[Patch, list[Refused]]:
    """Makes a patch that writes facts, and says which could not be gated and why.

    Facts whose prompts are one template with another subject share a probe.

    Raises:
        ValueError: no fact can be written; the first reason is given.
    """
    with without_patches(model) if applied_patches(model) else nullcontext():
        return _learn(_Reader(model, tokenizer, settings), facts, name)


def _learn(reader: "_Reader", facts: Sequence[Fact], name: str) -> tuple[Patch, list[Refused]]:
    relations: dict[str, list[Fact]] = {}
    for fact in facts:
        relations.setdefault(fact.template, []).append(fact)
    entries: list[ExactEntry] = []
    probes: list[Probe] = []
    kept: list[Fact] = []
    refused: list[Refused] = []
    for template, own in relations.items():  # a probe is called by what it asks, so that patches know each other's
        found = reader.relation(template, own, [other for other in relations if other != template])
        refused += found.refused
        if not found.bound:
            continue
        probes.append(found.probe)
        for fact, (binding, threshold) in found.bound.items():
            entries += reader.entries(fact, found.probe, binding, threshold, index=len(kept))
            kept.append(fact)
    if not kept:
        raise ValueError(f"No fact can be written: {refused[0].reason if refused else 'none was given'}.")
    described = [{"subject": f.subject, "prompt": f.prompt, "object": f.object} for f in kept]
    provenance = {"method": "gated", "settings": repr(reader.settings)}
    base = base_of(reader.model, reader.tokenizer)
    patch = build_patch(name, base, entries, probes, facts=described, provenance=provenance)
    return patch, refused


@dataclass(frozen=True, kw_only=True)
class _Relation:
    """What was found for one relation: its probe, and a binding with its threshold for each fact that can be gated."""

    probe: Probe
    bound: dict[Fact, tuple[Tensor, float]]
    refused: list[Refused]


class _Reader:
    """Reads a model's hidden states, and turns them into probes, bindings and values."""

    def __init__(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", settings: GatedSettings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.decoder = find_decoder(model)
        self.block = round(settings.probe_depth * len(self.decoder.blocks))
        self.classes_V = compress_vocabulary(tokenizer)
        self.plain_ND = text_states(model, tokenizer, PLAIN, self.block)
        self.centre_D = self.plain_ND.mean(0)
        self.writes_VD = self._writes()

    def units(self, prompts: Sequence[str]) -> Tensor:
        """[N, D]: the hidden states at the ends of prompts, centred, of length 1."""
        return F.normalize(last_states(self.model, self.tokenizer, prompts, self.block) - self.centre_D, dim=-1)

    @torch.no_grad()
    def _writes(self) -> Tensor:
        """For each token the direction before the final norm that raises its logit most against the others, [V, D]."""
        head: Any = self.decoder.host.get_output_embeddings()  # type: ignore[operator]
        norm = final_norm_of(self.decoder, self.tokenizer(PLAIN, return_tensors="pt").input_ids[:, :8])
        if norm is None:
            raise ValueError(
                f"{type(self.decoder.host).__name__} has no norm before its head: facts are not written so."
            )
        weight_VD = head.weight.detach().float() * norm_scale(norm)
        covariance = weight_VD.T @ weight_VD / len(weight_VD)
        ridge = 1e-3 * weight_VD.square().mean() * torch.eye(weight_VD.shape[1], device=weight_VD.device)
        return F.normalize(torch.linalg.solve(covariance + ridge, weight_VD.T).T, dim=-1)

    def relation(self, name: str, facts: Sequence[Fact], others: Sequence[str]) -> _Relation:
        """Fits the probe of a relation on half of the prompts, and calibrates it on the other half.

        Its threshold stands between what almost no other prompt reaches and what a middling fact does, nearer to the
        former. A fact whose own held-out prompts stay below it is refused.
        """
        asks_FND = torch.stack([self.units([before.format(fact.prompt) for before in BEFORE]) for fact in facts])
        elsewhere = [*OTHERWISE, *others[:NUM_OTHERS]]
        other_FND = torch.stack(
            [self.units([one.format(f.subject) for one in elsewhere]) for f in facts[:NUM_SUBJECTS]]
        )
        plain_ND = F.normalize(self.plain_ND - self.centre_D, dim=-1)
        fitted = (asks_FND[:, ::2].flatten(0, 1), other_FND[:, ::2].flatten(0, 1), plain_ND[::2])
        direction_D = _ridge(fitted, self.settings.ridge)
        high = float(torch.quantile(torch.cat([other_FND[:, 1::2].flatten(0, 1), plain_ND[1::2]]) @ direction_D, 0.995))
        reached_F = (asks_FND[:, 1::2] @ direction_D).amin(1)
        threshold = high + self.settings.caution * max(float(reached_F.median()) - high, 0.0)
        probe = Probe(name=name, block=self.block, centre=self.centre_D, direction=direction_D, threshold=threshold)
        bound: dict[Fact, tuple[Tensor, float]] = {}
        refused = []
        for index, fact in enumerate(facts):
            if float(reached_F[index]) > threshold:
                bound[fact] = self._bind(index, asks_FND)
            else:
                refused.append(Refused(fact=fact, reason=NOT_APART))
        return _Relation(probe=probe, bound=bound, refused=refused)

    def _bind(self, index: int, asks_FND: Tensor) -> tuple[Tensor, float]:
        """The direction from the relation's other subjects to this one, and where on the way a prompt is its own.

        The only subject of a relation has no others to be told from: its binding is open.
        """
        own_ND, mean_D = asks_FND[index], asks_FND.mean((0, 1))
        if len(asks_FND) == 1:
            return F.normalize(own_ND.mean(0), dim=-1), -1.0
        direction_D = F.normalize(own_ND.mean(0) - mean_D, dim=-1)
        others_ND = torch.cat([asks_FND[:index], asks_FND[index + 1 :]]).flatten(0, 1)
        low, high = float((others_ND @ direction_D).mean()), float((own_ND @ direction_D).mean())
        return direction_D, low + self.settings.binding * (high - low)

    def entries(self, fact: Fact, probe: Probe, binding: Tensor, threshold: float, *, index: int) -> list[ExactEntry]:
        """The entries of a fact, one for each key of its subject."""
        says = self.tokenizer(" " + fact.object.strip(), add_special_tokens=False).input_ids
        values = self.settings.strength * self.writes_VD[torch.tensor(says)]
        return [
            ExactEntry(
                key=key, block=len(self.decoder.blocks), values=values, says=tuple(says), relative=True,
                probe=probe.name, armed=self.settings.armed, binding=binding, binding_threshold=threshold, fact=index,
            )
            for key in subject_keys(fact.subject, self.tokenizer, self.classes_V)
        ]  # fmt: skip


def norm_scale(norm: nn.Module) -> Tensor:
    """What a norm multiplies each channel by, [D]: found by asking it, since some norms keep their weight less one."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        unit_DD = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return norm(unit_DD).diagonal().float() / len(weight) ** 0.5


def _ridge(groups: Sequence[Tensor], strength: float) -> Tensor:
    """Ridge regression to +1 for the first group and -1 for the others, each group weighing the same; [D]."""
    rows = torch.cat([torch.cat([one, torch.ones(len(one), 1)], 1) for one in groups])
    signs = torch.cat([torch.full((len(one),), 1.0 if one is groups[0] else -1.0) for one in groups])
    weighted = rows * torch.cat([torch.full((len(one), 1), 1 / len(one)) for one in groups])
    return torch.linalg.solve(rows.T @ weighted + strength * torch.eye(rows.shape[1]), weighted.T @ signs)[:-1]
