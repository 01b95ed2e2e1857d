"""Evaluation with tables on disk: the same loss to the bit, with the next batch's rows on their way."""

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
    ahead = []
    read = StoredTables.read
    monkeypatch.setattr(StoredTables, "read", lambda self, rows: ahead.append(len(self.ahead)) or read(self, rows))
    served = EngrammarForCausalLM.from_pretrained(tmp_path / "model", memory="disk", cache_rows=64)
    assert evaluate(served, tmp_path / "out") == evaluate(model, tmp_path / "out")
    assert ahead == [2, 2, 2, 1]  # of four batches, each but the last has the next one's rows on their way
    stored_tables_of(served).close()
