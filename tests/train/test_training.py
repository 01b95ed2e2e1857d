"""A run is a function of its recipe: seeded, resumable to the last bit, with mistakes named in one sentence."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import engrammar.train.trainer as trainer_module
from engrammar.train.recipe import Recipe, load_recipe, to_yaml
from engrammar.train.run import prepare_tokens, train
from engrammar.train.sample import Sampling, complete, load

ROOT = Path(__file__).parent.parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "loss_curve.json"


def tiny_recipe(folder: Path, *overrides: str) -> Recipe:
    """The licence as a corpus: a real text that never changes, a paragraph an entry."""
    source = folder / "licence.jsonl"
    if not source.exists():
        paragraphs = [text for text in (ROOT / "LICENSE").read_text().split("\n\n") if text.strip()]
        source.write_text("\n".join(json.dumps({"text": text}) for text in paragraphs))
    settings = (
        f"out={folder / 'run'}",
        f"data.source={source}",
        f"data.folder={folder / 'data'}",
        "data.vocab_size=400",
        "data.sequence_length=32",
        "data.limit_documents=null",
        "data.validation_share=0.2",
        "data.batch_size=8",
        "trainer.disable_tqdm=true",
        "trainer.eval_strategy=no",
        "trainer.save_strategy=steps",
        "trainer.logging_steps=1",
    )
    return load_recipe("micro", [*settings, *overrides])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def processor() -> list[str]:
    """What decides the last bit: the processor's generation, and the kernels that torch picks for it."""
    wanted = ("cpu family", "model\t", "stepping")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = sorted({" ".join(line.split()) for line in lines if line.startswith(wanted)})
    return [*found, torch.backends.cpu.get_cpu_capability(), torch.__version__, str(torch.get_num_threads())]


@pytest.mark.parametrize("memory", ["preset", "none"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, memory):
    settings = ("trainer.max_steps=10", "trainer.save_steps=4", f"model.memory={memory}")
    straight = train(tiny_recipe(tmp_path, *settings))
    again = tiny_recipe(tmp_path, *settings, f"out={tmp_path / 'killed'}")

    class Killed(Exception):
        pass

    original = trainer_module.EngrammarTrainer.training_step
    steps = []

    def dies_at_step_seven(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 7:
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.EngrammarTrainer, "training_step", dies_at_step_seven)
        with pytest.raises(Killed):
            train(again)
    resumed = train(again)
    expected, found = weights(tmp_path / "run"), weights(tmp_path / "killed")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    losses = [[entry["loss"] for entry in result["curve"] if "loss" in entry] for result in (straight, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 10
    assert resumed["validation_loss"] == straight["validation_loss"]


def test_a_run_killed_after_its_last_step_is_evaluated_not_trained_again(tmp_path, monkeypatch):
    settings = ("trainer.max_steps=4", "trainer.save_steps=2")
    straight = train(tiny_recipe(tmp_path, *settings))
    again = tiny_recipe(tmp_path, *settings, f"out={tmp_path / 'killed'}")

    class Killed(Exception):
        pass

    def dies(*_args, **_kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.EngrammarTrainer, "evaluate", dies)
        with pytest.raises(Killed):
            train(again)
    resumed = train(again)
    assert resumed["steps"] == straight["steps"] == 4 and resumed["tokens_per_second"] is None
    assert resumed["validation_loss"] == straight["validation_loss"]
    assert train(again) == resumed  # finished: nothing is done again
    expected, found = weights(tmp_path / "run"), weights(tmp_path / "killed")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_folder_with_a_run_of_another_recipe_is_refused(tmp_path):
    settings = ("trainer.max_steps=2", "trainer.save_steps=1")
    train(tiny_recipe(tmp_path, *settings))
    for change in ("optimizer.lr=1e-6", "seed=5", "model.settings.memory.seed=5", "data.vocab_size=380"):
        with pytest.raises(ValueError, match=f"holds a run of another recipe .{change.split('=')[0]} is "):
            train(tiny_recipe(tmp_path, *settings, change))
    moved = tiny_recipe(tmp_path, *settings, f"data.folder={tmp_path / 'elsewhere'}")
    assert train(moved)["steps"] == 2
    (tmp_path / "run" / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match=r"without its recipe\.yaml"):
        train(tiny_recipe(tmp_path, *settings))


def test_settings_of_memory_go_over_the_presets_own(tmp_path):
    train(tiny_recipe(tmp_path, "trainer.max_steps=1", "trainer.save_strategy=no", "model.settings.memory.head_dim=8"))
    model, _ = load(tmp_path / "run")
    assert model.config.memory_config.head_dim == 8 and model.config.memory_config.layers == (1,)


@pytest.mark.slow
def test_a_hundred_seeded_steps_follow_the_recorded_curve(tmp_path):
    """Remake the fixture with: REMAKE_FIXTURE=1 .venv/bin/pytest tests/train/test_training.py -k hundred"""
    result = train(tiny_recipe(tmp_path, "trainer.max_steps=100", "trainer.save_strategy=no", "optimizer.lr=1e-3"))
    losses = [entry["loss"] for entry in result["curve"] if "loss" in entry]
    if os.environ.get("REMAKE_FIXTURE"):
        FIXTURE.write_text(json.dumps({"processor": processor(), "losses": losses}, indent=1) + "\n")
    recorded = json.loads(FIXTURE.read_text())
    assert len(losses) == 100 and losses[-1] < 0.75 * losses[0]
    if processor() == recorded["processor"]:
        assert losses == recorded["losses"]
    else:  # another processor adds in another order
        assert losses == pytest.approx(recorded["losses"], rel=2e-3)


def test_experts_are_balanced_without_a_loss(tmp_path):
    train(tiny_recipe(tmp_path, "trainer.max_steps=3", "trainer.save_strategy=no", "optimizer.balance_rate=0.01"))
    biases = [tensor for name, tensor in weights(tmp_path / "run").items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    for bias in biases:
        steps = (bias / 0.01).round().to(int)
        torch.testing.assert_close(bias, steps * 0.01, atol=1e-6, rtol=0)
        assert steps.abs().max() <= 3 and (steps > 0).any() and (steps < 0).any()


def test_bits_per_byte_follow_from_the_summed_cross_entropy(tmp_path):
    recipe = tiny_recipe(tmp_path, "trainer.max_steps=2", "trainer.save_strategy=no", "data.validation_share=0.5")
    result = train(recipe)
    model, _ = load(tmp_path / "run")
    tokens = prepare_tokens(recipe.data)
    nats = scored = 0.0
    for block in tokens.blocks("validation", 32):
        ids, labels = block["input_ids"][None], block["labels"][None].clone()
        mask = block.get("attention_mask")
        logits = model(ids, attention_mask=None if mask is None else mask[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none", ignore_index=-100)
        nats, scored = nats + losses.sum().item(), scored + (labels[0, 1:] != -100).sum().item()
    assert result["validation_loss"] == pytest.approx(nats / scored, rel=1e-5)
    bytes_per_token = tokens.num_bytes("validation") / tokens.num_tokens("validation")
    assert result["validation_bits_per_byte"] == pytest.approx(nats / scored / math.log(2) / bytes_per_token, rel=1e-5)


def test_a_trained_folder_generates_and_refuses_another_tokenizer(tmp_path):
    train(tiny_recipe(tmp_path, "trainer.max_steps=2", "trainer.save_strategy=no"))
    loaded = load(tmp_path / "run")
    settings = [Sampling(max_new_tokens=5, temperature=0, seed=seed) for seed in (0, 1)]
    greedy = [complete(*loaded, "You may", sampling) for sampling in settings]
    assert greedy[0] == greedy[1] and greedy[0].startswith("You may")
    settings = ("trainer.max_steps=1", "trainer.save_strategy=no", "data.vocab_size=380")
    train(tiny_recipe(tmp_path, *settings, f"out={tmp_path / 'b'}"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "run" / file).write_bytes((tmp_path / "b" / file).read_bytes())
    with pytest.raises(ValueError, match="is not the one the model was built with"):
        load(tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load(tmp_path / "run")


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="Cannot write to .*file/run .*choose another `out`"):
        train(tiny_recipe(tmp_path, f"out={tmp_path / 'file' / 'run'}"))


def test_a_resolved_recipe_reads_back_equal(tmp_path):
    recipe = tiny_recipe(tmp_path, "model.settings.hidden_size=96", "optimizer.lr=1e-4")
    assert recipe.model.settings == {"hidden_size": 96} and recipe.optimizer.lr == 1e-4
    (tmp_path / "resolved.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "has no '='"),
        ("sed=1", "There is no setting 'sed'"),
        ("data.sauce=x", r"There is no setting 'data\.sauce'"),
        ("seed=many", "seed is 'many'; allowed: int"),
        ("seed=true", "seed is True; allowed: int"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'; allowed: float"),
        ("model.memory=lots", "allowed: preset, none, budget"),
        ("data=5", "data is 5; a section of settings is expected"),
        ("model.preset=giga", "model.preset is 'giga'; allowed: micro, nano"),
        ("model.rho=7", "model.rho is 7"),
        ("optimizer.memory_lr_scale=-5", "memory_lr_scale is -5"),
        ("data.sequence_length=-3", "sequence_length is -3"),
        ("seed=[", "The override 'seed=\[' is not valid YAML"),
        ("out.deep=5", "goes into 'out', which is not a section"),
        ("data.validation_share=0", "validation_share is 0.0; allowed: over 0, since a run is measured"),
    ],
)
def test_a_wrong_setting_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("nano", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_step=5", "trainer.max_step is not one of transformers' TrainingArguments"),
        ("model.settings.hiden_size=5", "'hiden_size' is not a setting of EngrammarConfig"),
        ("trainer.learning_rate=1", "its setting is optimizer.lr"),
        ("trainer.max_steps=0", "trainer.max_steps is 0"),
        ("trainer.save_only_model=true", "save_only_model is True; allowed: false, since a killed run resumes"),
        ("data.sequence_length=512", "this model allows up to 256"),
        ("model.settings.memory.rows=5", "unknown settings rows"),
    ],
)
def test_a_wrong_setting_of_model_or_trainer_is_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_recipe(tmp_path, override))


def test_an_unknown_recipe_lists_those_that_ship(tmp_path):
    with pytest.raises(ValueError, match="shipped are: .*micro, nano"):
        load_recipe("enormous")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")


PASSES = ("trainer.max_steps=4", "trainer.save_steps=2", "trainer.gradient_accumulation_steps=2")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder, and the result of a run in it whose tables are on the device."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, train(tiny_recipe(folder, *PASSES))


@pytest.mark.parametrize("overlap", ["none", "exact"])
@pytest.mark.parametrize("where", ["ram", "file"])
def test_a_run_gives_the_same_bits_wherever_its_tables_are(plain, tmp_path, where, overlap):
    folder, expected = plain
    there = (f"placement.where={where}", f"placement.overlap={overlap}", f"out={tmp_path / 'there'}")
    found = train(tiny_recipe(folder, *PASSES, *there))
    assert found["validation_loss"] == expected["validation_loss"]
    assert [entry.get("loss") for entry in found["curve"]] == [entry.get("loss") for entry in expected["curve"]]
    one, other = weights(folder / "run"), weights(tmp_path / "there")
    assert one.keys() == other.keys() and all(torch.equal(other[name], tensor) for name, tensor in one.items())


@pytest.mark.slow
def test_a_run_with_stale_reads_finishes_near_the_exact_one(tmp_path):
    settings = ("trainer.max_steps=12", "trainer.save_strategy=no", "placement.where=ram")
    exact = train(tiny_recipe(tmp_path, *settings))
    stale = train(tiny_recipe(tmp_path, *settings, "placement.overlap=stale", f"out={tmp_path / 'stale'}"))
    assert stale["steps"] == exact["steps"] == 12
    assert 0 < abs(stale["validation_loss"] - exact["validation_loss"]) < 0.05
