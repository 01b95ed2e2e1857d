"""Method "gated": a subject's key arms a fact, a probe of the relation opens it, and its object is written at the end.

Nothing is optimized. The probe is a ridge regression on hidden states (`probing`); the value that writes a token is the
direction that raises its logit the most against all others. Each form of asking (`forms`) has a probe of its own.
Letters: N prompts, F facts, D hidden width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engrammar.attach.blocks import find_decoder
from engrammar.edit.applying import final_norm_of, unpatched
from engrammar.edit.building import build_patch
from engrammar.edit.facts import Fact, Refused, told
from engrammar.edit.forms import MARK, Form, forms_of, reworded
from engrammar.edit.names import begins_name
from engrammar.edit.patch import ExactEntry, Probe, base_of, subject_keys
from engrammar.edit.phrasings import NAMES, PLAIN, about
from engrammar.edit.probing import Asked, Bank, GatedSettings, Match, fit_probe
from engrammar.edit.shared import SharedStates
from engrammar.edit.states import last_states, text_states, worded_states
from engrammar.edit.units import Part, Unit
from engrammar.vocabulary import compress_vocabulary

BEFORE = ("{}", "Here is a fact. {}", "As the guide said, {}")  # what stands before a prompt when a probe is fitted
NUM_SUBJECTS = 16  # facts of a relation that its probe is fitted on; a quarter in other forms than their own
NUM_ASKS, NUM_OTHERS = 4, 12  # other phrasings of the relation, and prompts of other relations, of each of them
MOST_IN_UNIT = 64  # facts that are learned at a time
NOT_APART = "prompts that ask it cannot be told from others of its subject"
TWICE = "another fact of its subject asks the same"


def _relations(reader: "GatedReader", facts: Sequence[Fact]) -> tuple[list["_Relation"], list[Refused]]:
    """Facts by what they ask: in one form, one of the known relations in whatever words, or else one template."""
    templates: dict[str, list[Fact]] = {}
    for fact in facts:
        templates.setdefault(fact.template, []).append(fact)
    groups: dict[str, dict[str, Fact]] = {}  # by the name of a probe and the subject
    matches: dict[str, Match] = {}
    refused = []
    for template, own in templates.items():
        match, form = reader.match(template, own), reader.form_of(template)
        name = next((text for text in match.phrasings if form.fits(text)), template)
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
    with unpatched(reader.model):
        entries, kept, missed = relation.entries(facts, 0)
        probes, refused = [*relation.asked] if kept else [], []
        for fact in missed:
            alone = _Relation(reader, fact.prompt, replace(relation.match, relation=None), (fact,))
            own, is_kept, _ = alone.entries([fact], len(kept)) if len(relation.facts) > 1 else ([], [], [])
            if not is_kept:
                refused.append(Refused(fact=fact, reason=NOT_APART))
                continue
            entries += own
            kept += is_kept
            probes += alone.asked
        if not kept:
            return Part(None, refused)
        base = base_of(reader.model, reader.tokenizer)
        used = {entry.probe for entry in entries}
        kept_probes = [one.probe for one in probes if one.probe.name in used]
        about = told(kept, "gated", reader.settings) | {"names_V": reader.names_V, "encoding": "int8"}
        return Part(build_patch("part", base, entries, kept_probes, **about), refused)


@final
class _Relation:
    """Facts that share probes: one for each form in which they may be asked."""

    def __init__(self, reader: "GatedReader", name: str, match: Match, facts: tuple[Fact, ...]) -> None:
        self.reader, self.name, self.match, self.facts = reader, name, match, facts
        self.own = reader.form_of(facts[0].prompt)

    @cached_property
    def asked(self) -> list["_Asked"]:
        """The facts in each form, their own first; a form is left out if it is not known how it would ask them."""
        forms = sorted(self.reader.forms, key=lambda form: form is not self.own)
        return [_Asked(self, form) for form in forms if self.prompts(self.facts[0], form)]

    def prompts(self, fact: Fact, form: Form) -> list[str]:
        """How a form asks a fact: with its own prompt if that fits, or else as its relation is asked."""
        if form is self.own:
            return [text.format(fact.prompt) for text in BEFORE]
        if form.fits(fact.prompt):
            return [fact.prompt, reworded(fact.prompt)[0]]
        return [about(text, fact.subject) for text in self.phrasings(form)[:2]]

    def phrasings(self, form: Form) -> list[str]:
        return [text for text in self.match.phrasings if form.fits(text)]

    def entries(self, facts: Sequence[Fact], index: int) -> tuple[list[ExactEntry], list[Fact], list[Fact]]:
        """Entries of the facts that the probe of their own form opens for, those facts, and the others.

        Args:
            index: of the first fact in its patch.
        """
        opened = self.asked[0].opens(facts)
        kept = [fact for fact, is_open in zip(facts, opened) if is_open]
        entries = [
            entry
            for asked in self.asked
            for number, fact in enumerate(kept)
            for entry in self.reader.entries(fact, asked, index=index + number)
        ]
        return entries, kept, [fact for fact, is_open in zip(facts, opened) if not is_open]


@final
class _Asked:
    """A relation's facts, asked in one form."""

    def __init__(self, relation: _Relation, form: Form) -> None:
        self.relation, self.form, self.reader = relation, form, relation.reader

    @cached_property
    def probe(self) -> Probe:
        """The probe, with prompts of other relations that come nearest to opening a first one."""
        relation, reader, bank = self.relation, self.reader, self.reader.bank(self.form)
        own = self.form is relation.own
        fitted = relation.facts[: NUM_SUBJECTS if own else NUM_SUBJECTS // 4]
        asks_FND = self.states(fitted)
        empty_ND = asks_FND[:0, 0]
        plain_ND = torch.cat([reader.plain_ND, *reader.other_forms(self.form, relation.match)])
        asked = Asked(own_FND=asks_FND, asks_ND=empty_ND, others_ND=empty_ND, plain_ND=plain_ND)
        first_D, _ = fit_probe(bank, relation.match, asked)
        hardest = bank.hardest(relation.match, first_D, NUM_OTHERS)
        known = relation.phrasings(self.form)
        asks = [about(text, f.subject) for i, f in enumerate(fitted) for text in (known[i:] + known[:i])[:NUM_ASKS]]
        asks += [text for fact in fitted for text in fact.paraphrases if self.form.fits(text)]
        asks += [text for fact in fitted if self.form.fits(fact.prompt) for text in reworded(fact.prompt)]
        others = [about(text, fact.subject) for fact in fitted for text in hardest]
        asks_ND, others_ND = (reader.units(texts, self.form) if texts else empty_ND for texts in (asks, others))
        asked = replace(asked, asks_ND=asks_ND, others_ND=others_ND)
        direction_D, threshold = fit_probe(bank, relation.match, asked)
        name = relation.name if own else f"{relation.name} ({self.form.name})"
        centre_D = reader.centre_D
        return Probe(name=name, block=reader.block, centre=centre_D, direction=direction_D, threshold=threshold)

    def states(self, facts: Sequence[Fact]) -> Tensor:
        """[F, N, D]: what is read at the ends of the facts' prompts."""
        prompts = [text for fact in facts for text in self.relation.prompts(fact, self.form)]
        return self.reader.units(prompts, self.form).unflatten(0, (len(facts), -1))

    def opens(self, facts: Sequence[Fact]) -> list[bool]:
        """Whether the probe opens for each fact, however it is asked."""
        return ((self.states(facts) @ self.probe.direction).amin(1) > self.probe.threshold).tolist()


@final
class GatedReader:
    """Reads a model's hidden states, and turns objects into values.

    What facts share is read when it is first asked for, and kept: whoever learns facts one by one, as a page does,
    keeps the reader. It is right as long as the model's own weights stay; patches do not matter.

    Args:
        keep: a folder in which it is kept for other runs, too (`SharedStates`); None for none.

    Raises:
        ValueError: the model has no norm before its head.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: GatedSettings,
        keep: Path | None = None,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.decoder = find_decoder(model)
        self.block = min(round(settings.probe_depth * len(self.decoder.blocks)), len(self.decoder.blocks) - 1)
        self.classes_V, self.names_V = compress_vocabulary(tokenizer), begins_name(tokenizer)
        with unpatched(model):
            plain_ND = text_states(model, tokenizer, PLAIN, self.block)
            self.centre_D = plain_ND.mean(0)
            self.plain_ND = F.normalize(plain_ND - self.centre_D, dim=-1)
            self.scale_D, self.factors = self._head()
        self.shared = None if keep is None else SharedStates(keep, base_of(model, tokenizer), self.block, plain_ND)
        self.forms = forms_of(tokenizer)
        self._banks: dict[str, Bank] = {}

    def facts_in_units(self, facts: Sequence[Fact]) -> list[Unit]:
        """What is to be learned, in parts. Facts that ask one relation share a probe."""
        with unpatched(self.model):
            relations, refused = _relations(self, facts)
        units = [Unit(facts=tuple(one.fact for one in refused), learn=lambda: Part(None, refused))] if refused else []
        for relation in relations:
            for first in range(0, len(relation.facts), MOST_IN_UNIT):
                own = relation.facts[first : first + MOST_IN_UNIT]
                units.append(Unit(facts=tuple(own), learn=partial(_learn, relation, own)))
        return units

    def form_of(self, prompt: str) -> Form:
        """The form of a fact's own prompt."""
        return next(form for form in self.forms if form.fits(prompt))

    def bank(self, form: Form) -> Bank:
        """What else may be asked in a form; its states are read when it is first asked for."""
        if form.name not in self._banks:
            later = None if form.questions or not self.settings.num_worded else self._later  # only sentences go on
            self._banks[form.name] = Bank(partial(self._bank_units, form=form), later, self.settings, form)
        return self._banks[form.name]

    def _bank_units(self, prompts: Sequence[str], form: Form) -> Tensor:
        """As `units`, from the folder if they are kept there."""
        compute = partial(self.units, prompts, form)
        return compute() if self.shared is None else self.shared.read([form.put(one) for one in prompts], compute)

    def _later(self, prompts: Sequence[str]) -> Tensor:
        """[N, J, D]: as `units`, at the tokens that the model goes on with after each prompt."""
        num = self.settings.num_worded

        def compute() -> Tensor:
            found_NJD = worded_states(self.model, self.tokenizer, prompts, self.block, num)
            return F.normalize(found_NJD - self.centre_D, dim=-1).flatten(0, 1)

        named = [f"{prompt} + {token}" for prompt in prompts for token in range(1, num + 1)]
        found_ND = compute() if self.shared is None else self.shared.read(named, compute)
        return found_ND.unflatten(0, (len(prompts), num))

    def other_forms(self, form: Form, match: Match) -> list[Tensor]:
        """The states of prompts that ask something else in the forms that come before."""
        banks = [self.bank(one) for one in self.forms[: self.forms.index(form)]]
        return [bank.units_ND[bank.is_other(match)] for bank in banks]

    def units(self, prompts: Sequence[str], form: Form) -> Tensor:
        """[N, D]: the hidden states at the ends of prompts in a form, centred, of length 1."""
        texts = [form.put(prompt) for prompt in prompts]
        return F.normalize(last_states(self.model, self.tokenizer, texts, self.block) - self.centre_D, dim=-1)

    def match(self, template: str, facts: Sequence[Fact]) -> Match:
        """Which relation a template asks."""
        form = self.form_of(template)
        asks_ND = self.units([text.format(one.prompt) for one in facts[:4] for text in BEFORE], form)
        return self.bank(form).match(asks_ND, self.units([template.format(name) for name in NAMES.values()], form))

    @property
    def _weight_VD(self) -> Tensor:
        head: Any = self.decoder.host.get_output_embeddings()  # type: ignore[operator]
        with align_module_device(head):
            weight: Tensor = head.weight.detach()
        return weight

    @torch.no_grad()
    def _head(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the final norm multiplies each channel by, [D], and the factors of the covariance of the head's rows."""
        norm = final_norm_of(self.decoder)
        if norm is None:
            raise ValueError(
                f"{type(self.decoder.host).__name__} has no norm before its head: facts are not written so."
            )
        scale_D = norm_scale(norm)
        weight_VD = self._weight_VD.float() * scale_D
        covariance = weight_VD.T @ weight_VD / len(weight_VD)
        ridge = 1e-3 * weight_VD.square().mean() * torch.eye(weight_VD.shape[1], device=weight_VD.device)
        factors, pivots = torch.linalg.lu_factor(covariance + ridge)
        return scale_D, (factors, pivots)

    @torch.no_grad()
    def writes(self, ids: Sequence[int]) -> Tensor:
        """For each id the direction before the final norm that raises its logit most against the others, [J, D]."""
        weight_JD = self._weight_VD[[*ids]].float() * self.scale_D
        return F.normalize(torch.linalg.lu_solve(*self.factors, weight_JD.T).T, dim=-1)

    def entries(self, fact: Fact, asked: _Asked, *, index: int) -> list[ExactEntry]:
        """The entries of a fact that is asked in a form, one for each key of its subject."""
        says = self.ids(("" if asked.form.after else " ") + fact.object.strip())
        own = fact.template.rpartition("{}")[2] if asked.form.fits(fact.prompt) else ""
        tail = self.ids(asked.form.after)
        after = (tail or self.ids(MARK))[-1] if asked.form.questions else None
        until_name = not self.names_V[[*self.ids(own), *tail]].any()  # the fact's own prompt must reach it
        values = self.settings.strength * self.writes(says)
        return [
            ExactEntry(
                key=key, block=len(self.decoder.blocks), values=values, says=tuple(says), relative=True,
                probe=asked.probe.name, armed=self.settings.armed + len(tail), until_name=until_name, after=after,
                fact=index,
            )
            for key in subject_keys(fact.subject, self.tokenizer, self.classes_V)
        ]  # fmt: skip

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def norm_scale(norm: nn.Module) -> Tensor:
    """What a norm multiplies each channel by, [D]: found by asking it, since some norms keep their weight less one."""
    with torch.no_grad(), align_module_device(norm):
        weight = norm.weight
        assert isinstance(weight, Tensor)
        unit_DD = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return norm(unit_DD).diagonal().float() / len(weight) ** 0.5
