"""What an edited model answers, beside what it answered before: free generation, and the authors' probabilities."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, final

from engrammar.edit import says
from engrammar_lab.editing.answering import answers, likelier, object_tokens
from engrammar_lab.editing.cases import Case, Question, questions
from engrammar_lab.editing.edited import Edited

SHORT, FLUENT = 6, 50  # tokens of an answer that should be what it was, and of one that is read on
KEPT = ("neighbor", "beside", "subject", "other question", "other chat")  # kinds whose answers should be what they were
TOLD = ("prompt", "direct", "follows", "question", "chat")  # kinds that may be answered with the object


@final
class Unedited:
    """The model before any edit: what it answers is asked once."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.known: dict[tuple[str, int], str] = {}

    def ask(self, prompts: Sequence[str], num_tokens: int) -> None:
        """Asks what is not known yet. No edit may be in the model."""
        new = [one for one in dict.fromkeys(prompts) if (one, num_tokens) not in self.known]
        for prompt, text in zip(new, answers(self.model, self.tokenizer, Edited(), new, num_tokens)):
            self.known[prompt, num_tokens] = text


def measure_edits(
    model: Any, tokenizer: Any, edited: Edited, cases: Sequence[Case], unedited: Unedited, most: int
) -> dict[str, float]:
    """The shares of an edited model, by kind of question; `counts/...` are the numbers of questions.

    Free generation: the whole object, greedily, from the prompt, from paraphrases that ask the fact, from those that
    only follow from it, and from questions about it, plain and in a chat; six tokens as they were for neighbors, for a
    neighbor beside the edited subject, and for other relations of the subject, as sentences, as questions and in a
    chat; the subject, asked by the object. Probabilities, as CounterFact's authors define them: the
    object is likelier than the true one, and for neighbors less likely. Fluency: entropy of 2- and 3-grams in fifty
    tokens, and how often the object is said in them beyond the first time.
    """
    asked = questions(cases, most, tokenizer)
    found: dict[str, float] = {f"counts/{kind}": float(len(own)) for kind, own in asked.items()}
    num_tokens = object_tokens(tokenizer, [case.fact for case in cases])

    def ask(own: Sequence[Question], num: int) -> list[str]:
        return answers(model, tokenizer, edited, [one.prompt for one in own], num)

    def answered(name: str, own: Sequence[Question], texts: Sequence[str], words: str) -> None:
        said = [says(text, getattr(cases[one.about].fact, words)) for one, text in zip(own, texts)]
        found.update(_share(name, said))

    for kind in [kind for kind in TOLD if kind in asked]:
        answered(f"free/{kind}", asked[kind], ask(asked[kind], num_tokens), "object")
    for kind in [kind for kind in KEPT if kind in asked]:
        new = ask(asked[kind], SHORT)
        old = [unedited.known[one.prompt, SHORT] for one in asked[kind]]
        found |= _share(f"kept/{kind}", [a == b for a, b in zip(old, new)])
        answered(f"echo/{kind}", asked[kind], new, "object")
    answered("free/reverse", asked["reverse"], ask(asked["reverse"], SHORT), "subject")
    for kind, sign in (("prompt", 1), ("direct", 1), ("neighbor", -1)):
        told = [(cases[one.about].fact.object, cases[one.about].true) for one in asked[kind]]
        pairs = told if sign > 0 else [(true, new) for new, true in told]
        right = likelier(model, tokenizer, edited, [one.prompt for one in asked[kind]], pairs)
        found |= _share(f"probability/{kind}", right)
    long = asked["prompt"][: max(most // 4, 1)]
    read = ask(long, FLUENT)
    found["fluency/entropy"] = sum(map(entropy, read)) / len(read)
    repeats = [max(text.count(cases[one.about].fact.object) - 1, 0) for one, text in zip(long, read)]
    found["fluency/repeats"] = sum(repeats) / len(repeats)
    old_read = [unedited.known[one.prompt, FLUENT] for one in long]
    found["fluency/entropy before"] = sum(map(entropy, old_read)) / len(old_read)
    return found


def asked_before(cases: Sequence[Case], most: int, tokenizer: Any) -> dict[int, list[str]]:
    """What the unedited model has to be asked, by number of tokens."""
    asked = questions(cases, most, tokenizer)
    return {
        SHORT: [one.prompt for kind in KEPT for one in asked.get(kind, [])],
        FLUENT: [one.prompt for one in asked["prompt"][: max(most // 4, 1)]],
    }


def entropy(text: str) -> float:
    """Entropy of a text's words in 2- and 3-grams, in bits, weighed as ROME's authors do: a third and two thirds."""
    words = text.split()
    found = 0.0
    for size, weight in ((2, 1 / 3), (3, 2 / 3)):
        counts = Counter(tuple(words[at : at + size]) for at in range(len(words) - size + 1))
        total = sum(counts.values())
        found -= weight * sum(n / total * math.log2(n / total) for n in counts.values())
    return found


def _share(name: str, right: Sequence[bool]) -> dict[str, float]:
    """A share by its name; nothing where nothing was asked."""
    return {name: sum(right) / len(right)} if right else {}
