"""Evaluation: every scored token counts once, and what transformers promises of `evaluate` and `predict` holds."""

import pytest
import torch
from transformers import TrainingArguments

from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.stores.serving import stored_tables_of
from engrammar.train.optimizer import OptimizerSettings
from engrammar.train.trainer import EngrammarTrainer
from models import VOCABULARY, tiny_model


def rows_of(count, length=11, seed=0):
    ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model, out, **settings):
    arguments = TrainingArguments(str(out), per_device_eval_batch_size=2, use_cpu=True, report_to="none")
    return EngrammarTrainer(model, arguments, **settings)


def expected_loss(model, rows):
    ids = torch.stack([row["input_ids"] for row in rows])
    return model(ids, labels=ids).loss.item()


class Incomparable(list):
    def __eq__(self, other):
        raise RuntimeError("Boolean value of Tensor with more than one value is ambiguous")

    __hash__ = None


@pytest.mark.parametrize("memory", [None, "disk"])
def test_metrics_are_computed_from_every_rows_predictions(tmp_path, memory):
    model, rows = tiny_model("paper"), rows_of(7)
    if memory is not None:
        model.save_pretrained(tmp_path / "model")
        model = EngrammarForCausalLM.from_pretrained(tmp_path / "model", memory=memory, cache_rows=64)

    def accuracy(prediction):
        assert prediction.predictions.shape == prediction.label_ids.shape == (7, 11)
        return {"accuracy": (prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean()}

    trainer = trainer_of(
        model,
        tmp_path,
        eval_dataset=rows,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    metrics = trainer.evaluate()
    ids = torch.stack([row["input_ids"] for row in rows])
    best = model(ids).logits.argmax(-1)
    assert metrics["eval_accuracy"] == pytest.approx((best[:, :-1] == ids[:, 1:]).float().mean().item())
    assert metrics["eval_loss"] == pytest.approx(expected_loss(model, rows), rel=1e-6)
    if memory is not None:
        stored_tables_of(model).close()


def test_sets_with_names_are_evaluated_one_by_one(tmp_path):
    model, sets = tiny_model("paper"), {"short": rows_of(3, 5), "long": rows_of(2, 17, seed=1)}
    trainer = trainer_of(model, tmp_path, eval_dataset=sets, bytes_per_eval_token=3.0)
    for metrics in (trainer.evaluate(), trainer.evaluate(sets)):
        for name, rows in sets.items():
            assert metrics[f"eval_{name}_loss"] == pytest.approx(expected_loss(model, rows), rel=1e-6)
        assert "eval_loss" not in metrics and not any("bits_per_byte" in name for name in metrics)


def test_a_set_is_the_trainers_own_if_it_is_the_same_object(tmp_path):
    rows = Incomparable(rows_of(3))
    trainer = trainer_of(tiny_model("paper"), tmp_path, eval_dataset=rows, bytes_per_eval_token=3.0)
    assert "eval_bits_per_byte" in trainer.evaluate() and "eval_bits_per_byte" in trainer.evaluate(rows)
    assert "eval_bits_per_byte" not in trainer.evaluate(Incomparable(rows_of(3)))


def test_tokens_weigh_alike_whatever_batch_they_are_in(tmp_path):
    model, rows = tiny_model("paper"), rows_of(3)
    rows[0] = {**rows[0], "labels": torch.where(torch.arange(11) < 9, -100, rows[0]["labels"])}
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    metrics = trainer_of(model, tmp_path, eval_dataset=rows).evaluate()
    assert metrics["eval_loss"] == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-6)


def test_packed_documents_are_evaluated_as_alone_and_as_they_are_trained(tmp_path):
    model, documents = tiny_model("paper"), [rows_of(1, length, seed=length)[0]["input_ids"] for length in (4, 7, 2)]
    ids = torch.cat(documents)
    starts = [0, 4, 11]
    packed = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(len(document)) for document in documents]),
        "labels": torch.where(torch.isin(torch.arange(13), torch.tensor(starts)), -100, ids),
    }
    losses = [model(document[None], labels=document[None]).loss for document in documents]
    nats = sum(loss.item() * (len(document) - 1) for loss, document in zip(losses, documents))
    metrics = trainer_of(model, tmp_path, eval_dataset=[packed, packed, packed]).evaluate()
    assert metrics["eval_loss"] == pytest.approx(nats / 10, rel=1e-5)
    batch = {name: values[None] for name, values in packed.items()}
    assert metrics["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_predictions_have_every_row_of_a_model_whose_tables_are_in_a_checkpoint(tmp_path):
    model, rows = tiny_model("paper"), rows_of(3)
    predicted = trainer_of(model, tmp_path, eval_dataset=rows).predict(rows)
    torch.testing.assert_close(
        torch.from_numpy(predicted.predictions), model(torch.stack([row["input_ids"] for row in rows])).logits
    )
    assert predicted.metrics["test_loss"] == pytest.approx(expected_loss(model, rows), rel=1e-6)


def test_evaluating_before_training_changes_nothing_of_it(tmp_path):
    rows, losses = rows_of(4), []
    for evaluates in (False, True):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, logging_steps=1, save_strategy="no", use_cpu=True, report_to="none"
        )
        trainer = EngrammarTrainer(tiny_model("paper"), arguments, train_dataset=rows, eval_dataset=rows)
        if evaluates:
            trainer.evaluate()
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_the_trainer_clips_by_its_arguments_alone(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer_settings\.max_grad_norm is 1\.0; allowed: None"):
        trainer_of(tiny_model("paper"), tmp_path, optimizer_settings=OptimizerSettings(max_grad_norm=1.0))
