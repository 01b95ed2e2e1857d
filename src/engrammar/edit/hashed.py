"""Method "rows": facts are written into rows of a hashed table that a subject's own n-grams read.

The rows are those of n-grams that end at the subject's last token and lie inside it. They are found by a solve: a
vector after the memory is optimized, and the smallest change of rows is solved for that makes the memory give it,
linearized through the fusion. A gradient on the rows may go on from there. Hashed rows are shared: `uses` says with
what.
Letters: W places at which a key ends, H columns, C row width, E = H*C, D hidden width, U rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from engrammar.attach.blocks import device_of, find_decoder
from engrammar.edit.applying import unpatched
from engrammar.edit.asking import Asking, Subject
from engrammar.edit.building import build_patch
from engrammar.edit.facts import Fact, Refused, told
from engrammar.edit.optimizing import Descent, Sought, Text, Texts, descend, frozen, one_value_a_group
from engrammar.edit.overlay import TableOverlay, replace_rows, scale_of, stored_rows, tables_of
from engrammar.edit.patch import base_of
from engrammar.edit.solving import RowSettings, Spread, after_memory, at_rows, find_site, solve_rows
from engrammar.edit.units import Part
from engrammar.edit.uses import inner_rows
from engrammar.edit.vector import NO_PLACE, UNSAID
from engrammar.tables.encodings import decode

SHORT = "its subject is one token, and the memory reads n-grams of two or more: name it by more words"
TAKEN = "other facts of the patch have changed all rows that its subject reads"


def learn_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], settings: RowSettings
) -> Part:
    """Makes a patch of row deltas, and says which facts could not be learned and why.

    Facts of one subject share rows; a row that an earlier subject has changed stays as that one wants it.

    Raises:
        ValueError: the model has no memory, or several; or no fact can be learned.
    """
    with unpatched(model), frozen(model):
        return _Learner(model, tokenizer, settings).learn(facts)


class _Learner:
    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: RowSettings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.site = find_site(model, settings.layer)
        self.asking = Asking(model, tokenizer, settings)
        self.how = Descent(steps=settings.steps, stop=settings.stop, kl=settings.kl, most=settings.most, lr=settings.lr)

    def learn(self, facts: Sequence[Fact]) -> Part:
        site = self.site
        refused: dict[Fact, str] = {}
        changed: dict[Subject, dict[int, Tensor]] = {}
        overlay = TableOverlay(site.memory.table(site.layer))
        try:
            for subject in tqdm(self.asking.subjects(facts), desc="rows", unit=" subjects", delay=2):
                reason = self._refusal(subject) or self._write(subject, changed)
                self._show(overlay, changed)
                refused |= dict.fromkeys(subject.facts, reason) if reason else {}
            while unsaid := self._unsaid(changed):  # what is taken back may have held others up
                for subject in unsaid:
                    refused |= dict.fromkeys(subject.facts, UNSAID)
                    del changed[subject]
                self._show(overlay, changed)
        finally:
            overlay.show(None)
        kept = [fact for fact in facts if fact not in refused]
        if not kept:
            raise ValueError(f"No fact can be learned: {next(iter(refused.values()))}.")
        rows = replace_rows(site.memory, {site.layer: _stacked(changed)})
        base = base_of(self.model, self.tokenizer)
        patch = build_patch("part", base, rows=rows, **told(kept, "rows", self.settings))
        return Part(patch, [Refused(fact=fact, reason=reason) for fact, reason in refused.items()])

    def _show(self, overlay: TableOverlay, changed: Mapping[Subject, Mapping[int, Tensor]]) -> None:
        """Puts the rows that are changed so far in front of the table."""
        overlay.show(None)
        if any(changed.values()):
            overlay.show(replace_rows(self.site.memory, {self.site.layer: _stacked(changed)})[1][self.site.layer])

    def _refusal(self, subject: Subject) -> str | None:
        """Why a subject cannot be written at all."""
        if max(map(len, subject.keys)) < min(self.site.memory.config.orders):
            return SHORT
        asked = (self.asking.text(fact.prompt, fact.object, subject, 0) for fact in subject.facts)
        return NO_PLACE if None in asked else None

    def _write(self, subject: Subject, changed: dict[Subject, dict[int, Tensor]]) -> str | None:
        """Finds the rows of a subject; returns why it cannot be."""
        texts = self.asking.texts(subject, 0, by_key=True)
        all_KH = self._rows(subject, {row for own in changed.values() for row in own})
        asked_K = torch.zeros(len(all_KH), dtype=torch.bool)
        asked_K[[key for text in texts for key in text.values]] = True
        asked_KH = all_KH.where(asked_K[:, None], -1)
        rows_U, index_KH = asked_KH.unique(return_inverse=True)
        index_KH = index_KH - int((rows_U < 0).sum())
        rows_U = rows_U[rows_U >= 0]
        if not len(rows_U):
            return TAKEN
        spread = Spread(index_KH, len(rows_U), self.site.memory.config.head_dim)
        find = self._by_gradient if self.settings.by == "gradient" else self._by_solve
        found = dict(zip(rows_U.tolist(), self._stored(rows_U) + find(texts, spread).cpu()))
        (model_key, *_) = asked_K.nonzero()[:, 0].tolist()
        for key in (~asked_K).nonzero()[:, 0].tolist():  # a spelling that no text has looks up the same numbers
            for row, other in zip(all_KH[key].tolist(), all_KH[model_key].tolist()):
                if row >= 0 and other in found:
                    found.setdefault(row, found[other])
        changed[subject] = found
        return None

    def _rows(self, subject: Subject, taken: set[int]) -> Tensor:
        """[keys, H]: the row that each key reads in each column; -1 where the n-gram reaches beyond the key, or another
        subject has changed the row."""
        device = device_of(find_decoder(self.model).module)
        rows_KH = torch.full((len(subject.keys), self.site.memory.config.num_columns), -1)
        for name in {fact.subject for fact in subject.facts}:
            for spelling in (" " + name.strip(), name.strip()):
                ids = self.tokenizer(spelling, add_special_tokens=False).input_ids
                key = subject.keys.index(tuple(int(self.asking.classes_V[one]) for one in ids))
                rows_KH[key] = inner_rows(ids, self.site.memory, device)[self.site.layer]
        return rows_KH.masked_fill(torch.isin(rows_KH, torch.tensor([*taken], dtype=torch.long)), -1)

    def _stored(self, rows_U: Tensor) -> Tensor:
        """The table's own rows, [U, C]."""
        memory, layer = self.site.memory, self.site.layer
        tables, stored_US = tables_of(memory), torch.from_numpy(stored_rows(memory, layer, rows_U.numpy()))
        return decode(stored_US, tables.width, tables.encoding, torch.float32, scale_of(memory, layer))

    def _by_gradient(self, texts: Sequence[Text], spread: Spread) -> Tensor:
        """What is to be added to the rows, [U, C], by Adam on the rows, from the solved ones on."""
        start_UC = self._by_solve(texts, spread)
        read = Texts(self.model, texts, at_rows(self.site))
        size = float(start_UC.square().mean().sqrt())
        sought = Sought(
            scale_P=torch.full((spread.num_rows,), size, device=start_UC.device),
            group_P=torch.zeros(spread.num_rows, dtype=torch.long, device=start_UC.device),
            width=spread.width,
            spread=lambda added_UC: spread(start_UC + added_UC),
        )
        return start_UC + descend(read, sought, self.how)

    def _by_solve(self, texts: Sequence[Text], spread: Spread) -> Tensor:
        """What is to be added to the rows, [U, C]: the smallest change that gives the vector that says the object."""
        one_value = [replace(text, values=(0,) * len(text.written)) for text in texts]
        read = Texts(self.model, one_value, after_memory(self.site))
        value_D = descend(read, one_value_a_group(read), self.how)[0] / self.site.scale
        return solve_rows(Texts(self.model, texts, at_rows(self.site)), self.site, spread, value_D, self.settings)

    @torch.no_grad()
    def _unsaid(self, changed: Mapping[Subject, Mapping[int, Tensor]]) -> list[Subject]:
        """The subjects with a fact that the model with all rows changed does not say."""
        unsaid = []
        for subject in changed:
            read = Texts(self.model, [text for _, text in self.asking.prompts(subject)], at_rows(self.site))
            if not bool(read.losses(read.logits(None))[1].all()):
                unsaid.append(subject)
        return unsaid


def _stacked(changed: Mapping[Subject, Mapping[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """All changed rows [U] and their values [U, C]."""
    pairs = [pair for own in changed.values() for pair in own.items()]
    return torch.tensor([row for row, _ in pairs]), torch.stack([value_C for _, value_C in pairs])
