"""transformers' own Trainer trains placed tables, of our model and of others, given our optimizer."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from engrammar.addressing import derive_geometry
from engrammar.config import MemoryConfig
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.table import MemoryTable
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.placement import place_tables, placement_of
from models import tiny_model

SETTINGS = {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-8}
MODES = {"fp32": {}, "accumulated": {"gradient_accumulation_steps": 2}, "bf16": {"bf16": True}}


class LlamaWithRows(LlamaForCausalLM):
    """A model of somebody else's, with a table whose rows are added to its embeddings."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        memory = MemoryConfig(
            layers=(0,), rows_per_head=(97, 101), num_heads=2, head_dim=8, max_ngram_size=3, compression="none"
        )
        geometry = derive_geometry(memory, num_classes=config.vocab_size, fill_class=0)
        self.rows = MemoryTable(memory, geometry, 0)
        self.sizes, self.offsets = geometry.head_sizes(0), geometry.head_offsets(0)
        torch.nn.init.zeros_(self.rows.weight)

    def forward(self, input_ids=None, labels=None, **kwargs):
        sizes = torch.tensor(self.sizes)
        pairs = input_ids * 31 + torch.nn.functional.pad(input_ids, (1, 0))[:, :-1]
        looked_up = self.rows(pairs[..., None] % sizes + torch.tensor(self.offsets))
        return super().forward(inputs_embeds=self.model.embed_tokens(input_ids) + looked_up, labels=labels, **kwargs)


def other_model() -> LlamaWithRows:
    torch.manual_seed(0)
    return LlamaWithRows(
        LlamaConfig(
            vocab_size=53,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).train()


def our_model() -> EngrammarForCausalLM:
    return tiny_model("paper").train()


class SaveRows(TrainerCallback):
    """What a model without our `save_pretrained` needs."""

    def on_save(self, args, state, control, model=None, **kwargs):
        placement_of(model).save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def sentences() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": ids, "labels": ids}
        for ids in (torch.randint(3, 53, (12,), generator=generator) for _ in "12345678")
    ]


def train(model, out: Path, resume: Path | None = None, **settings) -> Trainer:
    place_tables(model)
    optimizer = build_optimizer(model, OptimizerSettings(max_grad_norm=1.0), **SETTINGS)
    arguments = TrainingArguments(
        output_dir=str(out),
        **{"max_steps": 12, "per_device_train_batch_size": 4, "save_steps": 8, "logging_steps": 1, **settings},
        max_grad_norm=0.0,  # build_optimizer's clips dense gradients and rows together
        learning_rate=SETTINGS["lr"],
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    callbacks = [] if isinstance(model, EngrammarForCausalLM) else [SaveRows()]
    trainer = Trainer(model, arguments, train_dataset=sentences(), optimizers=(optimizer, None), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rows(model) -> dict[str, torch.Tensor]:
    placement = placement_of(model)
    placement.flush()
    return {f"{name}.weight": table.detach().clone() for name, table in placement.tables.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [our_model, other_model])
def test_it_trains_the_rows(tmp_path, build, mode):
    model = build()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trainer = train(model, tmp_path, save_strategy="no", **MODES[mode])
    curve = losses(trainer)
    assert curve[-1] < 0.8 * curve[0]
    for name, table in rows(model).items():
        assert table.dtype == torch.float32
        assert not torch.equal(table, before[name]), name
        assert (table == before[name]).all(1).any(), "rows that were never looked up keep their bits"


@pytest.mark.parametrize("build", [our_model, other_model])
@pytest.mark.slow
def test_it_saves_and_resumes_to_the_same_bits(tmp_path, build):
    straight = build()
    curve = losses(train(straight, tmp_path))
    saved = type(straight).from_pretrained(tmp_path / "checkpoint-12").state_dict()
    for name, table in rows(straight).items():
        assert torch.equal(saved[name], table), name
    resumed = build()
    with torch.no_grad():
        for param in resumed.parameters():
            param.zero_()
    assert losses(train(resumed, tmp_path / "again", resume=tmp_path / "checkpoint-8"))[8:] == curve[8:]
    for name, table in rows(straight).items():
        assert torch.equal(rows(resumed)[name], table), name


def test_a_placed_model_loads_whole_tables_and_refuses_others(tmp_path):
    model, other = our_model(), tiny_model("paper", seed=5)
    place_tables(model, where="file", folder=tmp_path)
    state = other.state_dict()
    assert not model.load_state_dict(state).missing_keys
    for name, table in rows(model).items():
        assert torch.equal(table, state[name])
    name = next(iter(rows(model)))
    with pytest.raises(ValueError, match=r"weight has shape \[3, 6\]; the table's is"):
        model.load_state_dict({**state, name: torch.zeros(3, 6)})
