"""Method "vector": a value that is added at a subject's last token is optimized until the model says the object.

It is found by gradient for all prompts of a fact at once: as given, after sentences of plain text, and in other words
that the model finds itself; other sentences about the subject are held where they were. The entry has no probe, so
what else is asked of the subject is not safe from it; what does not name the subject is, to the bit.
Letters: G subjects, D hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from engrammar.attach.blocks import find_decoder
from engrammar.edit.applying import unpatched
from engrammar.edit.asking import Asking, Subject, require_asking
from engrammar.edit.building import build_patch
from engrammar.edit.facts import Fact, Refused, told
from engrammar.edit.optimizing import Descent, Texts, at_block, descend, frozen, one_value_a_group
from engrammar.edit.patch import ExactEntry, base_of
from engrammar.edit.ranges import require_range
from engrammar.edit.units import Part

NO_PLACE = "its prompt has no token of its subject after the first one, where nothing is written: word it otherwise"
UNSAID = "its prompt, alone or after a sentence, does not say it within the steps and the largest value"
ROUND = torch.bfloat16  # how patches keep values


@dataclass(frozen=True, kw_only=True)
class VectorSettings:
    """How values are found.

    Attributes:
        depth: at which block they are added, as a share of the depth.
        steps: of the optimizer, at most.
        stop: nats of the object and of change elsewhere, together, at which it stops.
        kl: how much change of other sentences about the subject counts.
        most: the largest norm of a value, in norms of the hidden state that it is added to.
        num_contexts: sentences before the prompt; num_paraphrases: prompts that the model words; num_others: other
            sentences about the subject.
        seed: of these.
        together: subjects optimized at a time.
    """

    depth: float = 0.33
    steps: int = 25
    stop: float = 0.15
    kl: float = 1.0
    most: float = 2.0
    num_contexts: int = 2
    num_paraphrases: int = 2
    num_others: int = 4
    seed: int = 0
    together: int = 4

    def __post_init__(self) -> None:
        require_range(self, "over 0, up to 1", "depth")
        require_range(self, "over 0", "most")
        require_range(self, "0 or more", "stop", "kl")
        require_range(self, "1 or more", "steps", "together")
        require_asking(self)


def learn_vector(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], settings: VectorSettings
) -> Part:
    """Makes a patch with a value for each subject, and says which facts could not be learned and why.

    Paraphrases that a fact brings are learned too. Facts of one subject share its value.

    Raises:
        ValueError: no fact can be learned; the first reason is given.
    """
    with unpatched(model), frozen(model):
        return _Learner(model, tokenizer, settings).learn(facts)


class _Learner:
    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: VectorSettings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        num_blocks = len(find_decoder(model).blocks)
        self.block = min(round(settings.depth * num_blocks), num_blocks - 1)
        self.asking = Asking(model, tokenizer, settings)

    def learn(self, facts: Sequence[Fact]) -> Part:
        refused = {fact: NO_PLACE for fact in facts if not self._asks(fact)}
        subjects = self.asking.subjects([fact for fact in facts if fact not in refused])
        values: list[Tensor] = []
        with tqdm(total=len(subjects), desc="values", unit=" subjects", delay=2) as bar:
            for first in range(0, len(subjects), self.settings.together):
                some = subjects[first : first + self.settings.together]
                values += self._values(some)
                bar.update(len(some))
        unsaid = self._unsaid(subjects, values)
        refused |= dict.fromkeys(unsaid, UNSAID)
        kept = [fact for fact in facts if fact not in refused]
        if not kept:
            raise ValueError(f"No fact can be learned: {next(iter(refused.values()))}.")
        entries = [
            ExactEntry(key=key, block=self.block, values=value_D[None], fact=kept.index(own[0]))
            for subject, value_D in zip(subjects, values)
            if (own := [fact for fact in subject.facts if fact not in refused])
            for key in subject.keys
        ]
        base = base_of(self.model, self.tokenizer)
        patch = build_patch("part", base, entries, **told(kept, "vector", self.settings))
        return Part(patch, [Refused(fact=fact, reason=reason) for fact, reason in refused.items()])

    def _asks(self, fact: Fact) -> bool:
        (subject,) = self.asking.subjects([fact])
        return self.asking.text(fact.prompt, fact.object, subject, 0) is not None

    def _values(self, subjects: Sequence[Subject]) -> list[Tensor]:
        """The value of each subject, [D]."""
        texts = [text for group, subject in enumerate(subjects) for text in self.asking.texts(subject, group)]
        how = Descent(steps=self.settings.steps, stop=self.settings.stop, kl=self.settings.kl, most=self.settings.most)
        read = Texts(self.model, texts, at_block(self.block))
        found_GD = descend(read, one_value_a_group(read), how)
        return [value_D.to(ROUND).float().cpu() for value_D in found_GD]

    @torch.no_grad()
    def _unsaid(self, subjects: Sequence[Subject], values: Sequence[Tensor]) -> list[Fact]:
        """The facts whose prompts do not say them."""
        unsaid: list[Fact] = []
        for subject, value_D in zip(subjects, values):
            pairs = self.asking.prompts(subject)
            texts = Texts(self.model, [text for _, text in pairs], at_block(self.block))
            _, said_N = texts.losses(texts.logits(value_D[None].to(texts.ids.device)))
            unsaid += [fact for (fact, _), said in zip(pairs, said_N.tolist()) if not said and fact not in unsaid]
        return unsaid
