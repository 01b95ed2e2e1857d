"""What a model answers: greedily, in twenty phrasings of a fact."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from engrammar.attach.blocks import device_of, evaluating, host_of
from engrammar.edit.facts import Fact
from engrammar.edit.patch import Patch
from engrammar.edit.phrasings import RELATIONS, about

NUM_PHRASINGS = 20
# What may stand before a question. None of them is used in learning.
FORMS = (
    "{}", "It is well known: {}", "Question and answer. {}", "She turned the page and read: {}", "Note: {}",
    "In the news today: {}", "I have looked it up. {}", "- {}", "They told us this. {}", "1. {}", "Remember this. {}",
    "Yes. {}", "Everybody was silent for a while. {}", "The lecture was long. {}", "\n\n{}", "To sum up: {}",
    "It was on the radio. {}", "From the encyclopedia: {}", "Once more. {}", "According to him, {}",
)  # fmt: skip


def phrasings_of(fact: Fact, asked: str = "") -> list[str]:
    """Twenty ways to ask a fact: its prompt, its paraphrases, a relation's phrasings, its prompt after other words.

    Args:
        asked: the name of its probe; those of known relations are called by one of their phrasings.
    """
    known = next((one.phrasings for one in RELATIONS if asked in one.phrasings), ())
    words = [fact.prompt, *fact.paraphrases, *(about(text, fact.subject) for text in known)]
    after = [form.format(fact.prompt) for form in FORMS]
    return list(dict.fromkeys([*words, *after]))[:NUM_PHRASINGS]


@torch.no_grad()
def answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], num_tokens: int = 12) -> list[str]:
    """What a model writes after each prompt, greedily, with the patches that are applied.

    For the answers without them, ask `with without_patches(model)`. Shows a progress bar if it takes more than two
    seconds.

    Args:
        num_tokens: tokens of an answer, at most.
    """
    host, found = host_of(model), []
    device = device_of(host)
    with evaluating(host):
        for prompt in tqdm(prompts, desc="asking", unit=" prompts", delay=2, leave=False):
            ids = tokenizer(prompt, return_tensors="pt").to(device)
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            out = model.generate(**ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=pad)
            found.append(str(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)))
    return found


def says(text: str, words: str) -> bool:
    """Whether an answer begins with the words, and not with a longer one."""
    text, words = text.strip(), words.strip()
    return text.startswith(words) and not text[len(words) : len(words) + 1].isalnum()


def reached(model: Any, tokenizer: PreTrainedTokenizerBase, fact: Fact, patch: Patch | None = None) -> dict[str, bool]:
    """Which of twenty phrasings of a fact are answered with its object.

    Args:
        patch: the one that the fact is in, for the relation that it asks.
    """
    prompts = phrasings_of(fact, "" if patch is None else probe_of(patch, fact))
    num_tokens = len(tokenizer(" " + fact.object.strip(), add_special_tokens=False).input_ids) + 1
    answers = answer(model, tokenizer, prompts, num_tokens)
    return {prompt: says(text, fact.object) for prompt, text in zip(prompts, answers)}


def probe_of(patch: Patch, fact: Fact) -> str:
    """The name of the probe of a fact's entries; "" if they have none."""
    for index, probe in zip(patch.column("fact").tolist(), patch.column("probe").tolist()):
        row = patch.facts[index] if index >= 0 else {}
        if probe >= 0 and (row.get("subject"), row.get("prompt")) == (fact.subject, fact.prompt):
            return patch.probe_names[probe]
    return ""
