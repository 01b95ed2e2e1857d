"""`engrammar generate`: where the model is put, and that its inputs follow."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BatchEncoding

from engrammar.train.sample import Sampling, complete, load
from models import save_micro


@pytest.fixture
def folder(tmp_path):
    save_micro(tmp_path)
    return tmp_path


@pytest.mark.parametrize("memory", ["weights", "disk"])
def test_a_model_is_put_on_the_accelerator_and_its_prompt_follows(folder, memory, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    model, _ = load(folder, **({} if memory == "weights" else {"memory": memory}))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    given = SimpleNamespace(device=model.device)

    def generate(input_ids, attention_mask, **how):
        assert input_ids.device == attention_mask.device == model.device
        return torch.zeros(1, 1)

    given.generate = generate

    class Words:
        def __call__(self, text, return_tensors):
            return BatchEncoding({"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2)})

        def decode(self, ids, skip_special_tokens):
            return "done"

    assert complete(given, Words(), "To be", Sampling()) == "done"


def test_without_an_accelerator_a_model_is_on_the_cpu_and_a_device_can_be_named(folder, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert load(folder)[0].device.type == "cpu"
    assert load(folder, device="meta")[0].device.type == "meta"


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_bar_counts_the_tokens_and_changes_none(folder, num_beams, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **how):
            assert how["delay"] == 2 and how["total"] == 5
            self.count = 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self):
            self.count += 1

    monkeypatch.setattr("engrammar.train.sample.tqdm", Bar)
    model, tokenizer = load(folder, device="cpu")
    model.generation_config.eos_token_id = None
    sampling = Sampling(max_new_tokens=5, temperature=0, num_beams=num_beams)
    inputs = tokenizer("To be", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5, num_beams=num_beams, do_sample=False)
    said = complete(model, tokenizer, "To be", sampling)
    assert said == tokenizer.decode(ids[0], skip_special_tokens=True) and bars[0].count == 5


def test_a_chat_asks_in_the_template_and_shows_the_answer_alone(folder):
    model, tokenizer = load(folder)
    greedy = Sampling(max_new_tokens=4, temperature=0, chat=True)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template: ask without a chat"):
        complete(model, tokenizer, "to be", greedy)
    tokenizer.chat_template = "user: {{ messages[0].content }}\nanswer:"
    whole = complete(model, tokenizer, "user: to be\nanswer:", Sampling(max_new_tokens=4, temperature=0))
    assert whole == "user: to be\nanswer:" + complete(model, tokenizer, "to be", greedy)
