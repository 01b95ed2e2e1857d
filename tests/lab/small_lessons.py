"""A tiny model, and made-up corpora and questions, for studies that teach a model a text."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

from base_folder import write_base
from engrammar.train import parsers
from engrammar.train.corpora import POCKET
from engrammar_lab.adapters import lessons
from engrammar_lab.adapters.lessons import Amount
from engrammar_lab.adapters.variants import HOW
from engrammar_lab.tasks.questions import Question
from texts import WORDS

AMOUNT = Amount(
    num_taught=12,
    num_held=6,
    entry_tokens=(4, 400),
    length=24,
    num_facts=8,
    num_questions=3,
    num_chats=2,
    chat_tokens=4,
    background="wiki",
    num_background=20,
)
SMALL = replace(
    HOW,
    lora_rank=3,
    epochs=2,
    batch=4,
    memory={**HOW.memory, "layers": [2], "rows_per_head": [211, 223], "head_dim": 8},
)


FORMS = {
    "foldoc": "{0}: the {1} {2} of {3} and {4}. More {0}.",
    "wiki": "{0} is a {1} {2} of {3} {4}. It {1}.",
    "wordnet": "{0} (noun): the {1} {2} of {3} and {4}",
    "gcide": "{0}, n. The {4} {3} of {2}.",
}


def small_place(tmp_path, monkeypatch, study):
    """Where a study works; nothing is fetched, and models are taught in this process."""
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, form in FORMS.items():
        texts = [form.format(*(f"{WORDS[(i * k) % 12]}{WORDS[i // 12]}" for k in (1, 5, 7, 11, 13))) for i in range(60)]
        lines = [json.dumps(asdict(parsers.Entry(text, text))) for text in texts]
        (cache / f"{name}-{POCKET[name].version}-{parsers.VERSION}.jsonl").write_text("\n".join(lines) + "\n")
    asked = [Question(context=f"Q: moss {i}?\nA:", choices=(" tern", " moss"), answer=0, task="t") for i in range(9)]
    monkeypatch.setattr(lessons, "questions", lambda name, *, cache: asked)
    return {"base": write_base(tmp_path / "base"), "cache": cache, "results": tmp_path / "results"}
