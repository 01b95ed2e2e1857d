"""`engrammar attach` on a small model of transformers' own: one command from a folder of text to an adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import engrammar
from base_folder import write_base, write_image_base
from engrammar.attach.attaching import attachment_of
from engrammar_cli.main import main
from processes import succeed_on_ranks
from texts import make_texts

SMALL = (
    "data.batch_size=4", "data.sequence_length=16", "memory.rows_per_head=[211,223]", "memory.num_heads=2",
    "memory.head_dim=8", "trainer.use_cpu=true", "trainer.disable_tqdm=true", "trainer.max_steps=30",
    "trainer.save_steps=10", "optimizer.lr=0.01", "data.validation_share=0.2",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(300)))
    return path


def run(base: Path, text: Path, out: Path, *settings: str) -> None:
    main(["attach", str(base), *SMALL, *settings, "--data", str(text), "--out", str(out)])


def test_one_command_makes_an_adapter_that_loads_in_five_lines(base, text, tmp_path, capsys):
    run(base, text, tmp_path / "run")
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    before, after = (result[name]["bits_per_byte"] for name in ("without_memory", "with_memory"))
    assert after < before - 0.01 and f"{before:.4f} bits per byte without the memory, {after:.4f} with it" in said
    assert result["layers"] == [2] and result["steps"] == 30
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"{before:.4f} without the memory, {after:.4f} with it" in card and str(base) in card
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = tokenizer("the moss grows", return_tensors="pt").input_ids
    plain = model(ids).logits
    engrammar.load_attached(model, tmp_path / "run" / "adapter", tokenizer, memory="disk")
    assert not torch.allclose(model(ids).logits, plain)
    main(["generate", str(base), "the moss", "--adapter", str(tmp_path / "run" / "adapter"), "--max-new-tokens", "3"])
    assert capsys.readouterr().out.startswith("the moss")
    main(["verify", str(tmp_path / "run" / "adapter")])
    run(base, text, tmp_path / "run")  # a finished run is not repeated
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    with pytest.raises(SystemExit):
        run(base, text, tmp_path / "run", "seed=3")
    assert "seed is 0 there, 3 here" in capsys.readouterr().err


def test_a_base_that_transformers_knows_by_its_images(text, tmp_path, capsys):
    base, adapter = write_image_base(tmp_path / "base"), tmp_path / "run" / "adapter"
    run(base, text, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["with_memory"]["loss"] < result["without_memory"]["loss"] - 0.01
    assert f'model = AutoModelForImageTextToText.from_pretrained("{base}")' in (adapter / "README.md").read_text()
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    engrammar.load_attached(model, adapter, tokenizer)
    ids = tokenizer("the moss", return_tensors="pt").input_ids
    said = tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0])
    capsys.readouterr()
    prompt = ["the moss", "--adapter", str(adapter), "--max-new-tokens", "3", "--temperature", "0"]
    main(["generate", str(base), *prompt])
    assert capsys.readouterr().out.strip() == said


def test_sparse_training_says_how_much_of_the_background_it_changed(base, text, tmp_path):
    changed = {}
    for name, chosen in {"few": "rows=3", "many": "rows=100000", "none": "most_common=0"}.items():
        out = tmp_path / name
        run(
            base,
            text,
            out,
            f"sparse.{chosen}",
            f"sparse.background={text}",
            "sparse.blocks=30",
            "trainer.max_steps=4",
        )
        result = json.loads((out / "result.json").read_text())
        changed[name] = result["background_reads_changed"]
    assert changed["none"] == 0 < changed["few"] < changed["many"] < 1


def test_the_kept_prefix_changes_no_number(base, text, tmp_path):
    for keeps in ("true", "false"):
        run(base, text, tmp_path / keeps, f"keep_prefix={keeps}")
    kept, whole = (json.loads((tmp_path / keeps / "result.json").read_text()) for keeps in ("true", "false"))
    for name in ("without_memory", "with_memory"):
        assert kept[name]["loss"] == pytest.approx(whole[name]["loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["memory", "joint"])
def test_ranks_share_the_rows_and_save_one_adapter(trained, base, text, tmp_path):
    """Both runs make few steps, since the sums of two ranks are rounded otherwise."""
    how = ("trainer.max_steps=3", "optimizer.lr=0.001", "optimizer.memory=adam", f"train={trained}")
    how += ("keep_prefix=false",) if trained == "joint" else ()
    run(base, text, tmp_path / "one", *how)
    arguments = ["attach", str(base), *SMALL, *how, "--data", str(text), "--out", str(tmp_path / "two")]
    succeed_on_ranks(2, tmp_path, main, arguments)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("the moss grows", return_tensors="pt").input_ids
    logits, rows = {}, {}
    for name in ("one", "two"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model" if trained == "joint" else base)
        engrammar.load_attached(model, tmp_path / name / "adapter", tokenizer)
        logits[name] = model(ids).logits
        rows[name] = next(iter(attachment_of(model).memories().values())).memory.table(2).weight
    torch.testing.assert_close(logits["two"], logits["one"], rtol=0, atol=1e-4)
    touched = (rows["one"] != 0).any(dim=1)
    assert torch.equal(touched, (rows["two"] != 0).any(dim=1))  # nothing is lost at the border of the ranks' rows
    half = len(touched) // 2
    assert touched[:half].any() and touched[half:].any()
    torch.testing.assert_close(rows["two"], rows["one"], rtol=0, atol=1e-4)
    assert rows["one"].abs().max() > 1e-3  # so rows that were never given would be seen
    found, expected = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("two", "one"))
    assert found["with_memory"]["loss"] == pytest.approx(expected["with_memory"]["loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [(), ("placement.where=file", "optimizer.matrices=muon"), ("optimizer.memory=dense_adam",)]
)
def test_a_killed_run_goes_on_to_the_same_bits(how, base, text, tmp_path):
    run(base, text, tmp_path / "whole", *how)
    program = (
        "import os; from engrammar.train.attached import AttachedTrainer as T; from engrammar_cli.main import main\n"
        "step = T.training_step\n"
        "def dying(self, *a, **k):\n"
        "    if self.state.global_step == 17: os._exit(9)\n"
        "    return step(self, *a, **k)\n"
        "T.training_step = dying\n"
    )
    arguments = ["attach", str(base), *SMALL, *how, "--data", str(text), "--out", str(tmp_path / "killed")]
    done = subprocess.run([sys.executable, "-c", f"{program}main({arguments!r})"], capture_output=True, env=os.environ)
    assert done.returncode == 9
    run(base, text, tmp_path / "killed", *how)
    files = sorted(path.name for path in (tmp_path / "whole" / "adapter").iterdir() if path.suffix != ".md")
    for name in files:
        whole, killed = ((tmp_path / run / "adapter" / name).read_bytes() for run in ("whole", "killed"))
        assert whole == killed, name
    losses = [json.loads((tmp_path / run / "result.json").read_text())["with_memory"] for run in ("whole", "killed")]
    assert losses[0] == losses[1]


def test_a_run_killed_after_its_last_step_keeps_the_best_model(base, text, tmp_path):
    settings = (
        "trainer.max_steps=6", "trainer.save_steps=2", "trainer.eval_steps=2", "trainer.eval_strategy=steps",
        "trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=eval_loss",
        "trainer.greater_is_better=true", "trainer.save_total_limit=9", "keep_prefix=false",
    )  # fmt: skip
    run(base, text, tmp_path / "run", *settings)
    whole = json.loads((tmp_path / "run" / "result.json").read_text())
    losses = [entry["eval_loss"] for entry in json.loads(
        (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text()
    )["log_history"] if "eval_loss" in entry]  # fmt: skip
    assert whole["with_memory"]["loss"] == pytest.approx(losses[0], rel=1e-6) and losses[0] > losses[-1] + 0.01
    (tmp_path / "run" / "result.json").unlink()
    run(base, text, tmp_path / "run", *settings)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["with_memory"] == whole["with_memory"]


def test_training_the_model_too_saves_it_beside_the_adapter(base, text, tmp_path, capsys):
    run(base, text, tmp_path / "run", "train=joint", "keep_prefix=false", "trainer.max_steps=3")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    with pytest.raises(ValueError, match="is of a model with another"):
        engrammar.load_attached(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "adapter", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    engrammar.load_attached(model, tmp_path / "run" / "adapter", tokenizer)
    with pytest.raises(SystemExit):
        run(base, text, tmp_path / "other", "train=joint")
    assert "keep_prefix is True; allowed: false if the model is trained too" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_trained_and_leaves_nothing(base, text, tmp_path, capsys):
    run(base, text, tmp_path / "run", "trainer.max_steps=-1", "trainer.num_train_epochs=2", "--dry-run")
    said = capsys.readouterr().out
    assert "memory at block 2: " in said and "3 blocks" in said and "of what lies below the memory" in said
    assert "training: " in said and not (tmp_path / "run").exists()


def test_blocks_are_tried_and_nothing_is_left(base, text, tmp_path, capsys):
    run(base, text, tmp_path / "run", "--probe", "1,2", "--probe-steps", "3")
    said = capsys.readouterr().out
    header, _, *lines = said.splitlines()
    assert header.split() == ["block", "nats", "gain", "ms/step", "gain/min", "s", "before"]
    assert [line.split()[0] for line in lines] == ["1", "2"] and all(len(line.split()) == 6 for line in lines)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        run(base, text, tmp_path / "run", "--probe", "first")
    assert "--probe is 'first'; allowed: numbers of blocks" in capsys.readouterr().err


def test_a_model_that_is_none_is_one_sentence(text, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SystemExit):
        run(tmp_path / "nothing", text, tmp_path / "run")
    assert f"cannot load a causal language model from {tmp_path / 'nothing'}" in capsys.readouterr().err
