"""Memories are trained on a frozen base: by our optimizer, by transformers' Trainer, beside PEFT's LoRA."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import Trainer, TrainingArguments

from attached_models import attached_model, base_model, memory_config, random_ids, randomize, tokenizer
from engrammar.attach import attach, detach, disabled, load_attached, save_attached, set_trainable
from engrammar.attach.attaching import attachment_of
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.placement import place_tables
from engrammar.train.trainer import EngrammarTrainer

LORA = {"r": 2, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
ADAM = {"lr": 2e-2, "weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-8}


def copies(model) -> dict[str, torch.Tensor]:
    """The base's own parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "engrammar." not in name}


def sharp_base(family: str):
    """A base whose head can tell tokens apart: as it is initialized, no hidden state makes a token likely."""
    model = base_model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.to_dense() if grad.is_sparse else grad for name, grad in found.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", pytest.param("deepseek_v4", marks=pytest.mark.slow)])
def test_memory_learns_a_text_and_the_base_stays(family):
    model, ids = sharp_base(family), random_ids(4, 17)
    before = copies(model)
    attach(model, memory_config(), tokenizer())
    optimizer = build_optimizer(model, OptimizerSettings(memory_lr_scale=1.0), **ADAM)
    start = loss_of(model, ids).item()
    for _ in range(30):
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert loss_of(model, ids).item() < 0.5 * start
        with disabled(model):
            assert loss_of(model, ids).item() == pytest.approx(start)
    after = copies(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_only_rows_that_were_read_get_a_gradient():
    model, ids = base_model("llama").train(), random_ids(2, 9)
    attach(model, memory_config(), tokenizer())
    loss_of(model, ids).backward()
    memory = attachment_of(model)["default"].memory
    for layer, rows_BTH in memory.addresses(ids).items():
        grad = memory.table(layer).weight.grad
        assert grad.is_sparse and grad.coalesce().values().abs().sum() > 0
        assert set(grad.coalesce().indices()[0].tolist()) == set(rows_BTH.flatten().tolist())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen4_exp_text"])
def test_gradient_checkpointing_changes_no_gradient(family, reentrant):
    model, ids = attached_model(family).train(), random_ids(2, 9)
    set_trainable(model, "joint")
    for module in model.modules():  # gpt2's dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss_of(model, ids).backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss_of(model, ids).backward()
    found = gradients(model)
    assert found.keys() == expected.keys() and any("engrammar" in name for name in found)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7)


def test_recomputing_a_block_by_other_means_is_refused():
    """torch's own wrapper calls the block again when the pass is over, with nothing that tells its ids."""
    model, ids = attached_model("llama").train(), random_ids(2, 9)
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    loss = loss_of(model, ids)
    with pytest.raises(RuntimeError, match="own gradient checkpointing"):
        loss.backward()


def test_gradients_flow_through_a_cache():
    """The state is never detached: two passes give the gradients of one."""
    model, ids = attached_model("llama"), random_ids(2, 12)
    model(ids, use_cache=False).logits[:, 7:].square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    cache = model(ids[:, :7], use_cache=True).past_key_values
    model(ids[:, 7:], past_key_values=cache).logits.square().sum().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)


ARGUMENTS = {
    "max_steps": 40,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "lr_scheduler_type": "constant",
    "learning_rate": 2e-2,
    "weight_decay": 0.0,
}


def rows_of(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("kind", ["theirs", "ours"])
def test_a_trainer_trains_a_memory(kind, tmp_path):
    """transformers' Trainer is given our optimizer, and the tables are taken out of its sight, as for our own model."""
    model, ids = sharp_base("llama"), random_ids(4, 17)
    before, start = copies(model), loss_of(model, ids).item()
    attach(model, memory_config(), tokenizer())
    settings = OptimizerSettings(memory_lr_scale=1.0)
    if kind == "ours":
        args = TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS)
        trainer = EngrammarTrainer(model, args, optimizer_settings=settings, train_dataset=rows_of(ids), balance_rate=0)
    else:
        place_tables(model)
        optimizer = build_optimizer(model, replace(settings, max_grad_norm=1.0), **ADAM)
        args = TrainingArguments(output_dir=str(tmp_path), max_grad_norm=0.0, **ARGUMENTS)
        trainer = Trainer(model, args, train_dataset=rows_of(ids), optimizers=(optimizer, None))
    trainer.train()
    with torch.no_grad():
        assert loss_of(model, ids).item() < 0.5 * start
    after = copies(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("how", ["row_adam", "dense_adam", "LoRA"])
def test_our_trainer_resumes_an_attached_model_to_the_same_bits_and_takes_the_best(how, tmp_path):
    ids = random_ids(8, 17)
    settings = OptimizerSettings(memory_lr_scale=1.0, memory="dense_adam" if how == "dense_adam" else "row_adam")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}

    def train(out, resume=None, **other):
        torch.manual_seed(0)
        model = attach(sharp_base("llama"), memory_config(), tokenizer())
        if how == "LoRA":
            model = get_peft_model(model, LoraConfig(**LORA))
            set_trainable(model, "memory")
        args = TrainingArguments(
            output_dir=str(out),
            **{**ARGUMENTS, "save_strategy": "steps", "max_steps": 8, "save_steps": 4},
            logging_steps=1,
            **other,
        )
        data = {"train_dataset": rows_of(ids), "eval_dataset": rows_of(ids)}
        trainer = EngrammarTrainer(model, args, optimizer_settings=settings, balance_rate=0, **data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = train(tmp_path / "whole")
    again = train(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(again) == losses(whole)
    named = dict(again.model.named_parameters())
    assert all(torch.equal(value, named[name]) for name, value in whole.model.named_parameters())
    worst = train(tmp_path / "best", eval_strategy="steps", eval_steps=4, **best)
    evaluated = [entry["eval_loss"] for entry in worst.state.log_history if "eval_loss" in entry]
    assert worst.state.best_model_checkpoint.endswith("checkpoint-4") and evaluated[0] > 1.05 * evaluated[1]
    assert worst.evaluate()["eval_loss"] == pytest.approx(evaluated[0], rel=1e-6)


@pytest.mark.parametrize("order", ["memory first", "LoRA first"])
@pytest.mark.parametrize("targets", ["all-linear", r".*_proj", ["q_proj", "v_proj"]])
def test_beside_lora_in_either_order(order, targets):
    model, ids = base_model("llama"), random_ids(2, 13)
    if order == "memory first":
        attach(model, memory_config(), tokenizer())
        wrapped = get_peft_model(model, LoraConfig(target_modules=targets, **LORA))
    else:
        wrapped = get_peft_model(model, LoraConfig(target_modules=targets, **LORA))
        assert attach(wrapped, memory_config(), tokenizer()) is wrapped
    assert not any(isinstance(module, BaseTunerLayer) for module in attachment_of(wrapped).modules())
    set_trainable(wrapped, "memory")
    randomize(wrapped)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {"lora_" in name or "engrammar." in name for name in trained} == {True}
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    both = wrapped(input_ids=ids).logits
    both.square().sum().backward()
    assert {name for name, p in wrapped.named_parameters() if p.grad is not None} == trained
    with torch.no_grad(), disabled(wrapped):
        only_lora = wrapped(input_ids=ids).logits
    with torch.no_grad(), wrapped.disable_adapter():
        only_memory = wrapped(input_ids=ids).logits
        with disabled(wrapped):
            neither = wrapped(input_ids=ids).logits
    assert torch.equal(neither, base_model("llama").requires_grad_(False)(ids).logits)
    assert not torch.equal(only_lora, both) and not torch.equal(only_memory, both)
    generated = wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    plain = wrapped.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, use_cache=False
    )
    assert torch.equal(generated, plain)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, both, rtol=0, atol=1e-5)
    detach(wrapped)
    assert torch.equal(wrapped(input_ids=ids).logits, only_lora)


@torch.no_grad()
def test_a_base_in_bf16_keeps_its_bits_and_its_dtype():
    model, ids = base_model("llama").to(torch.bfloat16).requires_grad_(False), random_ids(2, 13)
    before = model(ids).logits
    attach(model, memory_config(), tokenizer())
    assert torch.equal(model(ids).logits, before)
    assert {p.dtype for p in attachment_of(model).parameters()} == {torch.float32}
    randomize(model)
    assert model(ids).logits.dtype == torch.bfloat16 and not torch.equal(model(ids).logits, before)


class IntLinear(torch.nn.Module):
    """A linear map whose weight is 8-bit integers, as quantizers make them."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max() / 127)
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def quantized_base():
    model = base_model("llama")
    for block in model.model.layers:
        for module in (block.self_attn, block.mlp):
            for name, child in [*module.named_children()]:
                if isinstance(child, torch.nn.Linear):
                    setattr(module, name, IntLinear(child))
    return model


def test_a_quantized_base(tmp_path):
    """It takes the adapter of the same base in full precision, and trains the memory alone."""
    exact, ids = attached_model("llama"), random_ids(2, 13)
    save_attached(exact, tmp_path / "adapter")
    model = quantized_base()
    before = model(ids).logits
    load_attached(model, tmp_path / "adapter", tokenizer())
    torch.testing.assert_close(model(ids).logits, exact(ids).logits, rtol=0, atol=0.01)
    loss_of(model, ids).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if name.startswith("engrammar.")
    }
    with pytest.raises(ValueError, match="are quantized, so only the memory can be trained"):
        set_trainable(model, "joint")
    save_attached(model, tmp_path / "again")
    assert torch.equal(load_attached(base_model("llama"), tmp_path / "again")(ids).logits, exact(ids).logits)
    detach(model)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.slow
@torch.no_grad()
def test_a_base_whose_blocks_are_compiled_reads_the_same_rows():
    model, ids = attached_model("llama"), random_ids(2, 13)
    expected = model(ids, use_cache=False).logits
    for block in model.model.layers:
        block.compile(backend="eager")
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-5)
    whole = torch.compile(attached_model("llama"), backend="eager")
    torch.testing.assert_close(whole(ids, use_cache=False).logits, expected, rtol=0, atol=1e-5)
    others = random_ids(2, 13, seed=4)
    torch.testing.assert_close(
        whole(others, use_cache=False).logits, model(others, use_cache=False).logits, rtol=0, atol=1e-5
    )
