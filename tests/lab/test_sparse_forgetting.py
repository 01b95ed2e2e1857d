"""Learning a text equally well in several ways, on a tiny model: the sparse memory changes less of other text."""

import json

import pytest
import torch

from attached_models import VOCABULARY, base_model, tokenizer
from engrammar_lab.adapters.forgetting import WAYS, Equal, compare_forgetting
from engrammar_lab.adapters.lessons import Lesson
from engrammar_lab.adapters.variants import How
from engrammar_lab.tasks.questions import Question


def blocks(seed: int, low: int, high: int) -> torch.Tensor:
    return torch.randint(low, high, (8, 10), generator=torch.Generator().manual_seed(seed))


HOW = How(
    batch=4,
    memory={"layers": [2], "rows_per_head": [997, 1009], "num_heads": 2, "head_dim": 8, "conv_kernel": 0},
    memory_lr=1e-2,
    lora_lr=2e-2,
    full_lr=5e-3,
    lora_rank=4,
)


@pytest.mark.slow
def test_each_way_stops_when_the_text_is_known(tmp_path):
    lesson = Lesson(
        taught=blocks(0, 20, VOCABULARY),
        held=blocks(1, 20, VOCABULARY),
        other=blocks(2, 2, 30),
        background=blocks(3, 2, 30),
        bytes_per_token={"taught": 3.0, "held": 3.0, "other": 3.0},
        facts={},
    )
    asked = {
        "chats": [("w3 w4", " w5 w6")],
        "fixed": {"set": [Question(context="w7 w8", choices=(" w9", " w10"), answer=0, task="set")]},
    }
    path = tmp_path / "results" / "forgetting.json"
    equal = Equal(nats=3.9, epochs=40, rows=150)
    made = compare_forgetting(
        lambda: (base_model("llama"), tokenizer()), lesson, blocks(3, 2, 30), path, how=HOW, equal=equal, asked=asked
    )
    assert json.loads(path.read_text()) == made and list(made["runs"]) == ["as it was", *WAYS]
    for way in WAYS:
        run = made["runs"][way]
        assert run["reached"] and run["taught/nats"] <= 3.9 < made["runs"]["as it was"]["taught/nats"]
    sparse, whole = (made["runs"][way]["background_reads_changed"] for way in ("memory, sparse rows", "memory"))
    assert sparse < whole
