"""What a fact is asked by while it is learned: contexts before its prompt, and other words for it; and what else is
asked of its subject. No test uses any of it."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engrammar.attach.blocks import device_of, find_decoder
from engrammar.attach.passes import cache_in
from engrammar.edit.exact import ExactTable
from engrammar.edit.facts import Fact
from engrammar.edit.lookup import find_keys, text_of
from engrammar.edit.optimizing import Text
from engrammar.edit.patch import Key, subject_keys
from engrammar.edit.phrasings import OTHERWISE, PLAIN
from engrammar.edit.ranges import require_most
from engrammar.vocabulary import compress_vocabulary

EXAMPLES = """Each line says the same in other words.
The capital of France is Paris. = France has its capital in Paris.
Marie Curie was born in Warsaw. = The birthplace of Marie Curie is Warsaw.
Toyota was founded by Kiichiro Toyoda. = The founder of Toyota is Kiichiro Toyoda.
The mother tongue of Leo Tolstoy is Russian. = Leo Tolstoy grew up speaking Russian.
"""
SENTENCES = [one.strip() + "." for one in PLAIN.replace("\n", " ").split(".") if one.strip()]
NEW_TOKENS, TRIES = 14, 6  # of a sentence that the model words; sentences for a fact


def require_asking(settings: object) -> None:
    """Checks how many texts of each kind settings ask for."""
    require_most(settings, len(SENTENCES), "num_contexts")
    require_most(settings, TRIES, "num_paraphrases")
    require_most(settings, len(OTHERWISE), "num_others")


def contexts(num: int, seed: int) -> list[str]:
    """Sentences of plain text that may stand before a prompt."""
    return random.Random(seed).sample(SENTENCES, num)


def others(subject: str, num: int, seed: int) -> list[str]:
    """Beginnings of other sentences about a subject."""
    return [one.format(subject) for one in random.Random(f"{seed} {subject}").sample(OTHERWISE, num)]


def asking(fact: Fact, sentences: Sequence[str]) -> list[str]:
    """What stands before the object in sentences that name the subject before it; the fact's own prompt left out."""
    found: dict[str, None] = {}
    for sentence in sentences:
        subject, said = sentence.find(fact.subject), sentence.rfind(" " + fact.object)
        if subject >= 0 and said >= subject + len(fact.subject):
            found[sentence[:said].strip()] = None
    return [one for one in found if one != fact.prompt]


@final
@dataclass(frozen=True, kw_only=True)
class Subject:
    """A subject and the facts about it, which share what is written at its keys."""

    keys: tuple[Key, ...]
    facts: tuple[Fact, ...]


@final
class Asking:
    """Makes the texts that a method reads: their tokens, and where keys of subjects end in them.

    Args:
        settings: the method's, as `require_asking` checks them.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Any) -> None:
        self.model: Any = find_decoder(model).host
        self.tokenizer, self.settings = tokenizer, settings
        self.classes_V = compress_vocabulary(tokenizer)
        self.before = ["{}", *(one + " {}" for one in contexts(settings.num_contexts, settings.seed))]

    def subjects(self, facts: Sequence[Fact]) -> list[Subject]:
        """Facts by what they are about: those whose subjects have a key in common stand together."""
        found: list[Subject] = []
        for fact in facts:
            keys, own = subject_keys(fact.subject, self.tokenizer, self.classes_V), [fact]
            for one in [one for one in found if set(one.keys) & set(keys)]:
                found.remove(one)
                keys, own = [*one.keys, *(key for key in keys if key not in one.keys)], [*one.facts, *own]
            found.append(Subject(keys=tuple(keys), facts=tuple(own)))
        return found

    def prompts(self, subject: Subject) -> list[tuple[Fact, Text]]:
        """Each fact with its own prompt, alone and after each context: what it has to be said after."""
        asked = [(fact, one.format(fact.prompt)) for fact in subject.facts for one in self.before]
        made = [(fact, self.text(prompt, fact.object, subject, 0)) for fact, prompt in asked]
        return [(fact, text) for fact, text in made if text is not None]

    def texts(self, subject: Subject, group: int, *, by_key: bool = False) -> list[Text]:
        """All that is learned of a subject, and what is held; `by_key` as in `text`."""
        asked: list[tuple[str, str | None]] = []
        for fact in subject.facts:
            prompts = [before.format(fact.prompt) for before in self.before] + list(fact.paraphrases)
            prompts += self.reworded(fact)
            asked += [(prompt, fact.object) for prompt in prompts]
        held = others(subject.facts[0].subject, self.settings.num_others, self.settings.seed)
        asked += [(prompt, None) for prompt in held]
        texts = [self.text(prompt, says, subject, group, by_key=by_key) for prompt, says in asked]
        return [text for text in texts if text is not None]

    @cached_property
    def _examples(self) -> tuple[Tensor, Any]:
        """The ids of `EXAMPLES`, and the cache of a pass that has read them."""
        ids = self.tokenizer(EXAMPLES, return_tensors="pt").input_ids.to(device_of(self.model))
        return ids, cache_in(find_decoder(self.model).module(ids, use_cache=True))

    @torch.no_grad()
    def reworded(self, fact: Fact) -> list[str]:
        """Up to `num_paraphrases` prompts that ask a fact in other words: what stands before the object in sentences
        that the model samples after examples, where they name the subject and end in the object."""
        if self.settings.num_paraphrases == 0:
            return []
        read, cache = self._examples[0], copy.deepcopy(self._examples[1])
        asked = f"{fact.prompt} {fact.object}. ="
        line = self.tokenizer(asked, add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([read, line.to(read)], 1).expand(TRIES, -1)
        # transformers' batch_repeat_interleave leaves out what recurrent layers, and ours, keep beside keys and values.
        cache.reorder_cache(torch.zeros(TRIES, dtype=torch.long))
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            made = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=True, top_p=0.9,
                max_new_tokens=NEW_TOKENS, pad_token_id=int(ids[0, 0]),
            )  # fmt: skip
        sentences = [text.split("\n")[0] for text in self.tokenizer.batch_decode(made[:, ids.shape[1] :])]
        return asking(fact, sentences)[: self.settings.num_paraphrases]

    def text(self, prompt: str, says: str | None, subject: Subject, group: int, *, by_key: bool = False) -> Text | None:
        """A prompt with what it should say, or (None) with what it should go on to expect; None where no key of the
        subject stands after the first token.

        Args:
            by_key: whether values belong to keys, in their order, instead of to the group.
        """
        ids = self.tokenizer(prompt).input_ids
        ends = self.found(ids, subject.keys)
        if not ends:
            return None
        words = () if says is None else self.tokenizer(" " + says.strip(), add_special_tokens=False).input_ids
        first = ends[0][0] if says is None else len(ids) - 1
        return Text(
            ids=(*ids, *words[:-1]),
            written=tuple(place for place, _ in ends),
            values=tuple(subject.keys.index(key) if by_key else group for _, key in ends),
            group=group,
            scored=tuple(range(first, len(ids) + len(words[:-1]))),
            says=tuple(words) or None,
        )

    def found(self, ids: Sequence[int], keys: Sequence[Key]) -> list[tuple[int, Key]]:
        """The place and key where keys end, but for the first token, where nothing is written."""
        longest = max(map(len, keys))
        padded = [[-1] * (longest - len(key)) + [*key] for key in keys]
        table = ExactTable(np.array(padded, np.int32))
        before = np.full((1, longest - 1), -1)
        number_T = find_keys(table, self.classes_V.astype(np.int32), text_of(np.array([ids]), before, None))[0]
        return [(place, keys[number_T[place]]) for place in np.nonzero(number_T >= 0)[0].tolist() if place > 0]
