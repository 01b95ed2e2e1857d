"""Evaluation with tables on disk: the same loss to the bit, with the next batch's rows on their way."""

from functools import wraps

import pytest
import torch
from transformers import TrainingArguments

from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.stores.serving import StoredTables, stored_tables_of
from engrammar.train.trainer import EngrammarTrainer
from models import VOCABULARY, tiny_model


def evaluate(model, out):
    ids = torch.randint(3, VOCABULARY, (7, 11), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(str(out), per_device_eval_batch_size=2, use_cpu=True, report_to="none")
    blocks = [{"input_ids": row, "labels": row} for row in ids]
    return EngrammarTrainer(model, arguments, eval_dataset=blocks).evaluate()["eval_loss"]


def test_a_served_model_evaluates_to_the_same_bits_and_reads_ahead(tmp_path, monkeypatch):
    model = tiny_model("paper")
    model.save_pretrained(tmp_path / "model")
    events = []
    for owner, name in ((StoredTables, "read"), (EngrammarForCausalLM, "forward")):
        call = getattr(owner, name)
        noted = lambda *args, call=call, name=name, **kwargs: events.append(name) or call(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(owner, name, wraps(call)(noted))
    served = EngrammarForCausalLM.from_pretrained(tmp_path / "model", memory="disk", cache_rows=64)
    assert evaluate(served, tmp_path / "out") == evaluate(model, tmp_path / "out")
    served_events = events[: events.index("forward") + 6]
    assert served_events == ["read", *["read", "forward"] * 3, "forward"]  # each batch's rows are read before its turn
    stored_tables_of(served).close()


def test_a_served_model_is_not_trained(tmp_path):
    tiny_model("paper").save_pretrained(tmp_path / "model")
    served = EngrammarForCausalLM.from_pretrained(tmp_path / "model", memory="ram")
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to="none")
    ids = torch.arange(3, 14)
    trainer = EngrammarTrainer(served, arguments, train_dataset=[{"input_ids": ids, "labels": ids}])
    with pytest.raises(ValueError, match="served, which cannot change them. Load it without `memory` to train it"):
        trainer.train()
