"""Blocks are tried one after another from the same start; the model is then as it was."""

import pytest
import torch
from torch.utils.data import default_collate

from attached_models import base_model, memory_config, random_ids, tokenizer
from engrammar.attach import attach, detach
from engrammar.train.attached import Prepared
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.probing import mean_loss, probe_layers
from engrammar.train.recipe import AttachRecipe, BaseRecipe, DataRecipe, OptimizerRecipe

TRAIN = [{"input_ids": row, "labels": row} for row in random_ids(6, 12)]
HELD = TRAIN[2:5]  # what is trained, so that a gain is sure
RECIPE = AttachRecipe(
    base=BaseRecipe(model="llama"),
    data=DataRecipe(batch_size=3),
    memory=memory_config().to_json(),
    optimizer=OptimizerRecipe(lr=2e-2, memory_lr_scale=1.0),
)


def sharp_base():
    model = base_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model


def plain_probe(layer: int) -> float:
    """Whole passes on a new model."""
    model = sharp_base()
    torch.manual_seed(0)
    attach(model, memory_config(layers=(layer,)), tokenizer())
    settings = OptimizerSettings(memory_lr_scale=1.0, matrices="adamw", max_grad_norm=1.0)
    optimizer = build_optimizer(model, settings, lr=2e-2, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
    loader = torch.utils.data.DataLoader(TRAIN, 3, shuffle=True, generator=torch.Generator().manual_seed(0))
    batches = [batch for _ in range(3) for batch in loader][:5]
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(model(**default_collate(HELD)).loss)


def probe_all(model, *, blocks=(TRAIN, HELD), layers=(0, 2, 3), steps=5):
    return probe_layers(RECIPE, Prepared(model=model, tokenizer=tokenizer(), tokens=None), blocks, layers, steps)


def test_each_block_gives_what_whole_passes_on_a_new_model_give():
    model, ids = sharp_base().train(), random_ids(2, 9)
    before, modes = model(ids).logits, [module.training for module in model.modules()]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    probes = probe_all(model)
    assert torch.equal(model(ids).logits, before) and not hasattr(model, "engrammar")
    assert [module.training for module in model.modules()] == modes
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    base = mean_loss(sharp_base(), HELD, 2)
    assert [probe.layer for probe in probes] == [0, 2, 3]
    for probe in probes:
        assert probe.loss == pytest.approx(plain_probe(probe.layer), abs=1e-3)
        assert probe.gain == pytest.approx(base - probe.loss, abs=1e-5) and probe.gain > 0.05
        assert probe.step_seconds > 0 and (probe.prefix_seconds > 0.001) == (probe.layer > 0)
    assert len({probe.loss for probe in probes}) == 3


def test_what_cannot_be_tried_is_refused_and_the_model_stays(tmp_path):
    model, ids = base_model("llama"), random_ids(2, 9)
    before = model(ids).logits
    with pytest.raises(ValueError, match=r"layers is \[1, 4\]; allowed: blocks from 0 to 3"):
        probe_all(model, layers=(1, 4))
    with pytest.raises(ValueError, match="steps is 0"):
        probe_all(model, steps=0)
    uneven = [{"input_ids": ids[0], "labels": ids[0]}, {"input_ids": ids[0, :5], "labels": ids[0, :5]}]
    with pytest.raises(ValueError, match="have 2 lengths"):
        probe_all(model, blocks=(uneven, HELD), layers=(2,))
    assert torch.equal(model(ids).logits, before) and not hasattr(model, "engrammar")
    attach(model, memory_config(), tokenizer())
    with pytest.raises(ValueError, match="has a memory already"):
        probe_all(model)
    detach(model)
