"""Method "gated": a subject's key arms a fact, a probe of the relation opens it, and its object is written at the end.

Nothing is optimized. The probe is a ridge regression on hidden states (`probing`); the value that writes a token is the
direction that raises its logit the most against all others.
Letters: N prompts, F facts, D hidden width, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engrammar.attach.blocks import find_decoder
from engrammar.edit.applying import applied_patches, final_norm_of, without_patches
from engrammar.edit.building import build_patch
from engrammar.edit.facts import Fact, Refused
from engrammar.edit.names import begins_name
from engrammar.edit.patch import ExactEntry, Probe, base_of, subject_keys
from engrammar.edit.phrasings import NAMES, PLAIN, RELATIONS, about
from engrammar.edit.probing import Asked, Bank, Match, ProbeSettings, fit_probe
from engrammar.edit.states import last_states, text_states
from engrammar.edit.units import Part, Unit
from engrammar.vocabulary import compress_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE = ("{}", "Here is a fact. {}", "As the guide said, {}")  # what stands before a prompt when a probe is fitted
NUM_SUBJECTS = 16  # facts of a relation that its probe is fitted on
NUM_ASKS, NUM_OTHERS = 4, 12  # other phrasings of the relation, and prompts of other relations, of each of them
MOST_IN_UNIT = 64  # facts that are learned at a time
NOT_APART = "prompts that ask it cannot be told from others of its subject"
TWICE = "another fact of its subject asks the same"


@dataclass(frozen=True, kw_only=True)
class GatedSettings(ProbeSettings):
    """How facts are written.

    Attributes:
        probe_depth: where probes read, as a share of the depth. Early blocks confuse relations.
        armed: tokens after the subject in which the probe may open, if no other name comes before.
        strength: the size of a write, in norms of the hidden state before the final norm.
    """

    probe_depth: float = 0.93
    armed: int = 16
    strength: float = 1.0


def gated_units(
    model: nn.Module, tokenizer: "PreTrainedTokenizerBase", facts: Sequence[Fact], settings: GatedSettings
) -> list[Unit]:
    """What is to be learned, in parts. Facts that ask one relation share a probe.

    Raises:
        ValueError: the model has no norm before its head.
    """
    reader = _Reader(model, tokenizer, settings)
    with reader.unpatched():
        relations, refused = _relations(reader, facts)
    units = [Unit(facts=tuple(one.fact for one in refused), learn=lambda: Part(None, refused))] if refused else []
    for relation in relations:
        for first in range(0, len(relation.facts), MOST_IN_UNIT):
            own = relation.facts[first : first + MOST_IN_UNIT]
            units.append(Unit(facts=tuple(own), learn=partial(_learn, relation, own)))
    return units


def _relations(reader: "_Reader", facts: Sequence[Fact]) -> tuple[list["_Relation"], list[Refused]]:
    """Facts by what they ask: one of the known relations in whatever words, or else one template."""
    templates: dict[str, list[Fact]] = {}
    for fact in facts:
        templates.setdefault(fact.template, []).append(fact)
    groups: dict[str, dict[str, Fact]] = {}  # by the name of a probe and the subject
    matches: dict[str, Match] = {}
    refused = []
    for template, own in templates.items():
        match = reader.match(template, own)
        name = template if match.relation is None else RELATIONS[match.relation].phrasings[0]
        for fact in own:
            place = next((one for one in (name, template) if fact.subject not in groups.get(one, {})), None)
            if place is None:
                refused.append(Refused(fact=fact, reason=TWICE))
                continue
            groups.setdefault(place, {})[fact.subject] = fact
            matches.setdefault(place, match)
    found = [_Relation(reader, name, matches[name], tuple(own.values())) for name, own in groups.items()]
    return found, refused


def _learn(relation: "_Relation", facts: Sequence[Fact]) -> Part:
    """Learns some facts of a relation; those that its probe does not open for are tried with one of their own."""
    reader = relation.reader
    with reader.unpatched():
        entries, kept, missed = relation.entries(facts, 0)
        probes, refused = [relation.probe] if kept else [], []
        for fact in missed:
            alone = _Relation(reader, fact.prompt, replace(relation.match, relation=None), (fact,))
            own, is_kept, _ = alone.entries([fact], len(kept)) if len(relation.facts) > 1 else ([], [], [])
            if not is_kept:
                refused.append(Refused(fact=fact, reason=NOT_APART))
                continue
            entries += own
            kept += is_kept
            probes.append(alone.probe)
        if not kept:
            return Part(None, refused)
        described = [{"subject": f.subject, "prompt": f.prompt, "object": f.object} for f in kept]
        base = base_of(reader.model, reader.tokenizer)
        about: dict[str, Any] = {
            "facts": described,
            "provenance": {"method": "gated", "settings": repr(reader.settings)},
            "names_V": reader.names_V,
        }
        return Part(build_patch("part", base, entries, probes, encoding="int8", **about), refused)


@final
class _Relation:
    """Facts that share a probe."""

    def __init__(self, reader: "_Reader", name: str, match: Match, facts: tuple[Fact, ...]) -> None:
        self.reader, self.name, self.match, self.facts = reader, name, match, facts

    @cached_property
    def asks_FND(self) -> Tensor:
        """Prompts of the facts that the probe is fitted on."""
        return self.reader.asks(self.facts[:NUM_SUBJECTS])

    @cached_property
    def probe(self) -> Probe:
        """The probe, with prompts of other relations that come nearest to opening a first one."""
        reader, bank, fitted = self.reader, self.reader.bank, self.facts[:NUM_SUBJECTS]
        empty_ND = self.asks_FND[:0, 0]
        blank = Probe(name=self.name, block=reader.block, centre=reader.centre_D, direction=empty_ND, threshold=0.0)
        asked = Asked(own_FND=self.asks_FND, asks_ND=empty_ND, others_ND=empty_ND, plain_ND=reader.plain_ND)
        first = fit_probe(blank, bank, self.match, asked)
        hardest = bank.hardest(self.match, first.direction, NUM_OTHERS)
        known = () if self.match.relation is None else RELATIONS[self.match.relation].phrasings
        asks = [about(text, f.subject) for i, f in enumerate(fitted) for text in (known[i:] + known[:i])[:NUM_ASKS]]
        asks += [text for fact in fitted for text in fact.paraphrases]
        others = [about(text, fact.subject) for fact in fitted for text in hardest]
        asks_ND, others_ND = (reader.units(texts) if texts else empty_ND for texts in (asks, others))
        return fit_probe(blank, bank, self.match, replace(asked, asks_ND=asks_ND, others_ND=others_ND))

    def entries(self, facts: Sequence[Fact], index: int) -> tuple[list[ExactEntry], list[Fact], list[Fact]]:
        """Entries of the facts that the probe opens for, those facts, and the others.

        Args:
            index: of the first fact in its patch.
        """
        entries: list[ExactEntry] = []
        kept: list[Fact] = []
        missed: list[Fact] = []
        for fact, asks_ND in zip(facts, self.reader.asks(facts)):
            if float((asks_ND @ self.probe.direction).min()) > self.probe.threshold:
                entries += self.reader.entries(fact, self.probe, index=index + len(kept))
                kept.append(fact)
            else:
                missed.append(fact)
        return entries, kept, missed


@final
class _Reader:
    """Reads a model's hidden states, and turns objects into values."""

    def __init__(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", settings: GatedSettings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.decoder = find_decoder(model)
        self.block = min(round(settings.probe_depth * len(self.decoder.blocks)), len(self.decoder.blocks) - 1)
        self.classes_V, self.names_V = compress_vocabulary(tokenizer), begins_name(tokenizer)
        with self.unpatched():
            plain_ND = text_states(model, tokenizer, PLAIN, self.block)
            self.centre_D = plain_ND.mean(0)
            self.plain_ND = F.normalize(plain_ND - self.centre_D, dim=-1)
            self.writes_VD = self._writes()
            self.bank = Bank(self.units, settings)

    def unpatched(self) -> AbstractContextManager[None]:
        """Patches that are applied do not matter."""
        return without_patches(self.model) if applied_patches(self.model) else nullcontext()

    def units(self, prompts: Sequence[str]) -> Tensor:
        """[N, D]: the hidden states at the ends of prompts, centred, of length 1."""
        return F.normalize(last_states(self.model, self.tokenizer, prompts, self.block) - self.centre_D, dim=-1)

    def asks(self, facts: Sequence[Fact]) -> Tensor:
        """[F, len(BEFORE), D]: the facts' own prompts."""
        return self.units([text.format(one.prompt) for one in facts for text in BEFORE]).unflatten(0, (len(facts), -1))

    def match(self, template: str, facts: Sequence[Fact]) -> Match:
        """Which relation a template asks."""
        named_KD = self.units([template.format(name) for name in NAMES.values()])
        return self.bank.match(self.asks(facts[:4]).flatten(0, 1), named_KD)

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

    def entries(self, fact: Fact, probe: Probe, *, index: int) -> list[ExactEntry]:
        """The entries of a fact, one for each key of its subject."""
        says = self.tokenizer(" " + fact.object.strip(), add_special_tokens=False).input_ids
        after = self.tokenizer(fact.template.rpartition("{}")[2], add_special_tokens=False).input_ids
        until_name = not self.names_V[after].any()  # the fact's own prompt must reach it
        values = self.settings.strength * self.writes_VD[torch.tensor(says)]
        return [
            ExactEntry(
                key=key, block=len(self.decoder.blocks), values=values, says=tuple(says), relative=True,
                probe=probe.name, armed=self.settings.armed, until_name=until_name, fact=index,
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
