"""TRL's SFTTrainer trains an attached memory; its base stays as it is, to the bit."""

import pytest
import torch
from datasets import Dataset
from test_attached_training import ADAM, copies, loss_of, sharp_base
from transformers import default_data_collator
from trl import SFTConfig, SFTTrainer

from attached_models import memory_config, random_ids, tokenizer
from engrammar.attach import attach, detach, keep_prefix
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.placement import place_tables

ARGUMENTS = {
    "max_steps": 30,
    "per_device_train_batch_size": 4,
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "lr_scheduler_type": "constant",
}


def train(model, dataset, folder, **settings) -> SFTTrainer:
    place_tables(model)
    optimizer = build_optimizer(model, OptimizerSettings(memory_lr_scale=1.0, max_grad_norm=1.0), **ADAM)
    collator = settings.pop("data_collator", None)
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(folder), **ARGUMENTS, **settings),
        train_dataset=dataset,
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
        data_collator=collator,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("packing", [False, True])
def test_it_trains_the_memory_alone(packing, tmp_path):
    """On texts of several lengths, padded or packed."""
    model, ids = sharp_base("llama"), random_ids(4, 17)
    plain, logits = copies(model), model(ids).logits
    attach(model, memory_config(), tokenizer())
    texts = [{"input_ids": row[: 17 - 3 * i].tolist()} for i, row in enumerate(ids)]
    before = loss_of(model, ids).item()
    train(model, Dataset.from_list(texts), tmp_path, packing=packing, max_length=17)
    with torch.no_grad():
        assert loss_of(model, ids).item() < 0.7 * before
    after = copies(model)
    assert after.keys() == plain.keys() and all(torch.equal(after[name], plain[name]) for name in plain)
    assert torch.equal(detach(model)(ids).logits, logits)


@pytest.mark.slow
def test_a_kept_prefix_gives_the_same_losses(tmp_path):
    """Items as they are: TRL prepares nothing, and drops no column that its own code does not know."""
    ids, losses = random_ids(4, 17), []
    items = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    for keeps in (False, True):
        model = sharp_base("llama")
        attach(model, memory_config(), tokenizer())
        calls = []
        model.model.layers[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        kept = keep_prefix(model, items, tmp_path / "kept") if keeps else None
        calls.clear()
        trainer = train(
            model,
            Dataset.from_list([{name: x.tolist() for name, x in (kept or items)[i].items()} for i in range(4)]),
            tmp_path,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            data_collator=default_data_collator,
            logging_steps=5,
        )
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert bool(calls) != keeps
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[0][-1] < 0.7 * losses[0][0]


def test_trls_own_optimizer_trains_no_step(tmp_path):
    """A table's gradient is sparse, and torch's AdamW takes none: optimizers= is needed."""
    model = sharp_base("llama")
    attach(model, memory_config(), tokenizer())
    texts = Dataset.from_list([{"input_ids": row.tolist()} for row in random_ids(4, 17)])
    config = SFTConfig(output_dir=str(tmp_path), **ARGUMENTS)
    with pytest.raises(RuntimeError, match="[Ss]parse"):
        SFTTrainer(model, config, train_dataset=texts, processing_class=tokenizer()).train()
