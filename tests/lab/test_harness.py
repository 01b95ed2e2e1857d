"""What the harness promises: lm-eval's scores are the model's own log likelihoods and continuations."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attached_models import memory_config, randomize
from engrammar.attach import attach, save_attached
from engrammar.fusion import Fusion
from engrammar.off import memory_off
from engrammar.tables.released import import_tables
from engrammar_cli.main import main as command_line
from engrammar_lab import harness
from engrammar_lab.harness import evaluate, load_model
from models import tiny_model
from released_models import qwen_model, qwen_release

pytest.importorskip("lm_eval")

TEXT = "owls hoot at night and mice hide in the barn while the moon is out"
QUESTIONS = [
    ("owls hoot at", (" night", " noon and mice", " the barn", " mice"), 0),
    ("mice hide in the", (" moon", " barn", " night while owls"), 1),
    ("the moon", (" is out", " hides in the barn"), 0),
    ("while the moon is out and owls", (" hide", " hoot", " mice", " at the", " barn"), 1),
    ("night", (" and mice", " owls"), 1),
]


@pytest.fixture(autouse=True)
def no_survey(monkeypatch):
    """lm-eval runs pip to list what is installed, for seconds; engrammar leaves that list out."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small untrained model with memory, its weights large enough that choices differ, and a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path)
    model = tiny_model("paper", num_branches=2, max_position_embeddings=64)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "memory" not in name:
                weight.mul_(8)
    model.save_pretrained(path)
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=53, special_tokens=["<pad>", "<s>", "</s>"])
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write(path: Path, asked) -> str:
    lines = [{"context": context, "choices": list(choices), "answer": answer} for context, choices, answer in asked]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def log_likelihood(model, tokenizer, context: str, choice: str) -> float:
    """The plain twin: one sequence, one token after the other."""
    before, ids = len(tokenizer.encode(context)), tokenizer.encode(context + choice)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[position - 1, ids[position]]) for position in range(before, len(ids)))


def own_scores(model, tokenizer) -> tuple[float, float]:
    right = normed = 0
    for context, choices, answer in QUESTIONS:
        found = [log_likelihood(model, tokenizer, context, choice) for choice in choices]
        right += found.index(max(found)) == answer
        per_character = [value / len(choice) for value, choice in zip(found, choices)]
        normed += per_character.index(max(per_character)) == answer
    return right / len(QUESTIONS), normed / len(QUESTIONS)


@pytest.mark.parametrize(("memory", "batch_size"), [("weights", 1), ("ram", 7), ("off", 7)])
def test_scores_equal_a_loop_over_questions(folder, tmp_path, memory, batch_size):
    name = write(tmp_path / "owls.jsonl", QUESTIONS)
    task = evaluate(folder, [name], memory=memory, batch_size=batch_size)["tasks"][name]
    model, tokenizer = load_model(folder)
    if memory == "off":
        silence(model)
    assert tuple(score["value"] for score in task["scores"].values()) == own_scores(model, tokenizer)
    assert list(task["scores"]) == ["acc", "acc_norm"] and task["num_questions"] == 5 and task["num_cut"] == 0
    assert task["chance"] == pytest.approx((1 / 4 + 1 / 3 + 1 / 2 + 1 / 5 + 1 / 2) / 5)


def silence(model) -> None:
    """Values of zero: by the weights, where `memory_off` goes by the gates."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Fusion):
                module.projection.weight[: module.hidden_size] = 0


def test_memory_off_scores_the_model_with_silent_fusions_and_not_the_whole(folder, monkeypatch):
    def likelihood(model, tokenizer, specs, chances):
        return log_likelihood(model, tokenizer, QUESTIONS[0][0], " night")

    monkeypatch.setattr(harness, "_find_tasks", lambda tasks, cache: ([], {}))
    monkeypatch.setattr(harness, "_score", likelihood)
    off = evaluate(folder, ["any"], memory="off")["tasks"]
    model, tokenizer = load_model(folder)
    whole = log_likelihood(model, tokenizer, QUESTIONS[0][0], " night")
    silence(model)
    assert off == pytest.approx(log_likelihood(model, tokenizer, QUESTIONS[0][0], " night"), abs=1e-5)
    assert abs(off - whole) > 1e-2


def test_written_answers_equal_greedy_generation(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "NUM_ANSWER_TOKENS", 7)
    model, tokenizer = load_model(folder)
    model.generation_config.suppress_tokens = [0, 1, 2]  # so that an answer has text
    contexts = ["owls hoot", "mice hide in the barn while", "the"]
    written = []
    for context in contexts:
        ids = torch.tensor([tokenizer.encode(context)])
        out = model.generate(ids, do_sample=False, max_new_tokens=harness.NUM_ANSWER_TOKENS, pad_token_id=0)
        written.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(set(written)) > 1
    asked = [(context, (text.strip(),), 0) for context, text in zip(contexts, written)]
    asked[2] = (contexts[2], ("what the model does not write",), 0)
    name = write(tmp_path / "written.jsonl", asked)
    found = harness._find_tasks([name], tmp_path)
    task = harness._score(model, tokenizer, *found, batch_size=3)[
        name
    ]  # contexts of unequal length: padded on the left
    assert task["scores"]["exact_match"]["value"] == pytest.approx(2 / 3) and task["chance"] is None


def test_limit_shots_and_cut_questions_are_counted(folder, tmp_path):
    long = [("owls hoot at night and mice hide in the barn while " * 6, (" owls", " mice"), 0), *QUESTIONS]
    name = write(tmp_path / "long.jsonl", long)
    task = evaluate(folder, [name], limit=3)["tasks"][name]
    assert task["num_questions"] == 3 and task["num_fewshot"] == 0 and task["num_cut"] == 1
    task = evaluate(folder, [name], limit=2, num_fewshot=2)["tasks"][name]
    assert task["num_fewshot"] == 2 and task["num_cut"] >= 1


def test_a_transformers_model_is_scored_too(folder, tmp_path):
    config = LlamaConfig(
        vocab_size=53, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    name = write(tmp_path / "owls.jsonl", QUESTIONS)
    found = evaluate(tmp_path / "llama", [name])["tasks"][name]["scores"]
    assert tuple(score["value"] for score in found.values()) == own_scores(*load_model(tmp_path / "llama"))
    with pytest.raises(ValueError, match="memory is off, but the model in .* has no memory"):
        load_model(tmp_path / "llama", "off")


def test_an_adapter_is_scored_on_any_tier_and_off(folder, tmp_path, capsys):
    """Each equals a loop over the questions with the memory attached; off is the base alone."""
    config = LlamaConfig(
        vocab_size=53, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    torch.manual_seed(0)
    model, tokenizer, base = LlamaForCausalLM(config), make_tokenizer(), tmp_path / "llama"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    plain = own_scores(model, tokenizer)
    asked = (tokenizer, QUESTIONS[0][0], " night")
    without = log_likelihood(model, *asked)
    attach(model, memory_config(layers=(1,)), tokenizer)
    randomize(model)
    save_attached(model, tmp_path / "adapter")
    name = write(tmp_path / "owls.jsonl", QUESTIONS)
    for memory, expected in (("weights", own_scores(model, tokenizer)), ("off", plain)):
        task = evaluate(base, [name], memory=memory, adapter=tmp_path / "adapter")["tasks"][name]
        assert tuple(score["value"] for score in task["scores"].values()) == expected
    for memory in ("weights", "ram", "disk"):
        served = load_model(base, memory, adapter=tmp_path / "adapter")[0]
        assert log_likelihood(served, *asked) == pytest.approx(log_likelihood(model, *asked), abs=1e-6)
    assert abs(log_likelihood(model, *asked) - without) > 1e-2
    out = ["--out", str(tmp_path / "scores.json"), "--limit", "2"]
    command_line(["eval", str(base), "--tasks", name, "--adapter", str(tmp_path / "adapter"), "--memory", "disk", *out])
    assert f"{base} with {tmp_path / 'adapter'}, memory: disk" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text())["adapter"] == str(tmp_path / "adapter")
    with pytest.raises(ValueError, match="--tables and --adapter do not go together"):
        load_model(base, "disk", tmp_path, tmp_path / "adapter")
    with pytest.raises(ValueError, match="is of a model with"):
        load_model(folder, adapter=tmp_path / "adapter")


@pytest.fixture
def release(tmp_path) -> Path:
    """A small Qwen4-Exp model as it is released, with a tokenizer; `tables`, its tables as ours, lies beside it."""
    model = qwen_model(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "ngram" not in name:
                weight.mul_(8)
    release = qwen_release(model, tmp_path / "release")
    import_tables(release, tmp_path / "tables")
    make_tokenizer().save_pretrained(release)
    return release


def test_a_released_model_continues_a_prompt_with_its_tables_on_disk(release, tmp_path, capsys):
    model, tokenizer = load_model(release)
    ids = model.generate(torch.tensor([tokenizer.encode("owls hoot")]), do_sample=False, max_new_tokens=7)
    how = ["--memory", "disk", "--tables", str(tmp_path / "tables"), "--cache-rows", "32"]
    capsys.readouterr()
    command_line(["generate", str(release), "owls hoot", "--max-new-tokens", "7", "--temperature", "0", *how])
    assert capsys.readouterr().out.strip() == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_a_released_model_is_scored_with_its_tables_served_and_off(release, tmp_path):
    name = write(tmp_path / "owls.jsonl", QUESTIONS)
    found = {
        where: evaluate(release, [name], memory=where, tables=tables)["tasks"][name]
        for where, tables in (("weights", None), ("disk", tmp_path / "tables"), ("off", tmp_path / "tables"))
    }
    assert found["weights"] == found["disk"]
    served, tokenizer = load_model(release, "ram", tmp_path / "tables")
    plain = load_model(release)[0]
    asked = (tokenizer, QUESTIONS[0][0], " night")
    assert log_likelihood(served, *asked) == log_likelihood(plain, *asked)
    with memory_off(plain):
        off = tuple(score["value"] for score in found["off"]["scores"].values())
        assert off == own_scores(plain, tokenizer)
    with pytest.raises(ValueError, match="--memory is ram, but the model in .* is none of ours: give --tables"):
        load_model(release, "ram")
    with pytest.raises(ValueError, match="--tables is for a model whose tables are not loaded"):
        load_model(release, "weights", tmp_path / "tables")


def test_mistakes_are_one_clear_sentence(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"There is no task 'local/mmul'; allowed: local/mmlu, "):
        evaluate(folder, ["local/mmul"])
    with pytest.raises(ValueError, match="--tasks is empty"):
        evaluate(folder, [])
    with pytest.raises(ValueError, match=r"tests has no config.json that names a model"):
        load_model(Path("tests"))
    with pytest.raises(ValueError, match=r"memory is 'tape'; allowed: weights, ram, disk, off"):
        load_model(folder, "tape")
    name = write(tmp_path / "mixed.jsonl", [("a", (" b",), 0), *QUESTIONS])
    with pytest.raises(ValueError, match=r"mixes questions of one choice"):
        evaluate(folder, [name])
    name = write(tmp_path / "owls.jsonl", QUESTIONS)
    for how, message in (({"limit": 0}, "limit is 0; allowed: 1"), ({"num_fewshot": -1}, "num_fewshot is -1")):
        with pytest.raises(ValueError, match=message):
            evaluate(folder, [name], **how)
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs lm-eval: pip install 'engrammar\[eval\]'"):
        evaluate(folder, [name])


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    tiny_model("paper").save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<more>", "<than>", "<the>", "<model>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"The tokenizer in .* has \d+ tokens and the model 53: it is of another"):
        load_model(tmp_path)


@pytest.mark.slow
def test_an_unknown_task_names_its_neighbours(folder):
    with pytest.raises(ValueError, match=r"lm-eval has no task 'hellaswg': near it are .*hellaswag"):
        evaluate(folder, ["hellaswg"])


@pytest.mark.slow
def test_the_command_writes_scores_with_what_made_them(folder, tmp_path, monkeypatch, capsys):
    name, out = write(tmp_path / "owls.jsonl", QUESTIONS), tmp_path / "new" / "scores.json"
    monkeypatch.setattr(sys, "argv", ["engrammar", "eval", str(folder), "--tasks", name, "--out", str(out)])
    command_line()
    assert "acc_norm" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["command"].startswith("engrammar eval") and result["versions"]["lm_eval"] and result["machine"]["cpu"]
    assert result["tasks"][name]["num_questions"] == 5
