"""What the command line promises: quick help, JSON keys, one sentence for a mistake, an exit code that tells."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engrammar_cli.main import main
from models import tiny_model

ROOT = Path(__file__).parents[2]
COMMAND = [str(Path(sys.executable).parent / "engrammar")]


def run(*arguments: str) -> subprocess.CompletedProcess:
    """The command as a user starts it, which takes seconds to load torch."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def call(monkeypatch, capsys):
    """The same in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(ROOT)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["engrammar", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    "command",
    [(), *((name,) for name in ("train", "generate", "data", "info", "check", "bench", "demo", "eval", "lab"))],
)
def test_help_takes_under_a_second(command):
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        done = run(*command, "--help")
        best = min(best, time.perf_counter() - started)
    assert done.returncode == 0 and done.stdout.startswith("usage: engrammar")
    assert best < 1.0


def test_info_speaks_json(call):
    counts = json.loads(call("info", "engram-27b", "--json")[1])
    assert counts["memory_parameters"] == 5_792_338_560
    assert {"total_parameters", "active_parameters", "memory_rows", "bytes_per_token"} <= counts.keys()
    assert "memory rows                  72,404,232" in call("info", "engram-27b")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "giga"), "There is no preset 'giga'"),
        (("info", "tests"), "tests has no config.json"),
        (("generate", "tests", "Hello"), "tests has no config.json"),
        (("train", "absent"), "There is no recipe file absent"),
        (("train", "nano", "sed=1"), "There is no setting 'sed'"),
        (("train", "tests"), "There is no recipe file tests"),
        (("train", "nano", "trainer.max_stepz=3", "--dry-run"), "trainer.max_stepz is not one of"),
        (("generate", "tests", "Hello", "--num-beams", "0"), "num_beams is 0"),
        (("data", "nowhere.txt", "--out", "data/x"), "nowhere.txt"),
        (("data", "pocket:stdlib"), "needs --out"),
        (("check", "reference"), "at least one reference file"),
        (("check", "reference", "absent.json"), "absent.json"),
        (("demo", "--seeds", "0"), "--seeds is 0"),
        (("eval",), "needs the folder of a model"),
        (("lab", "run", "luck"), "There is no study 'luck'"),
        (("lab", "run", "pair", "--scale", "1t"), "There is no scale '1t'"),
        (("lab", "rerun", "allocation", "3%"), "no run of point '3%' with seed 0; points: '100%'"),
        (("lab", "measure", "--out", "absent"), "holds no finished run"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(call, arguments, message):
    code, _, errors = call(*arguments)
    assert code == 2, errors
    lines = [line for line in errors.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("engrammar: ") and message in lines[0]


def test_a_process_ends_with_that_sentence_and_code():
    done = run("info", "giga")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"engrammar: There is no preset 'giga'.*\n", done.stderr)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "is not the config of an engrammar model"),
        ("config.json", "[]", "is not the config of an engrammar model"),
        ("config.json", "{}", "its model_type is not engrammar"),
        ("config.json", '{"model_type": "engrammar", "hidden_size": "big"}', "is not the config of an engrammar model"),
        ("tokenizer.json", "{", "The tokenizer in"),
    ],
)
def test_a_damaged_folder_is_one_sentence(call, tmp_path, name, content, message):
    tiny_model("paper").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_text(content)
    command = ("info", str(tmp_path)) if name == "config.json" else ("generate", str(tmp_path), "Hello")
    code, _, errors = call(*command)
    assert code == 2 and message in errors.splitlines()[-1], errors


def test_dry_run_prints_the_resolved_recipe(call):
    code, shown, _ = call("train", "nano", "trainer.max_steps=3", "--dry-run")
    assert code == 0 and "max_steps: 3" in shown and "rho: 0.78" in shown


def test_data_lists_the_pocket_corpora(call):
    lines = call("data")[1].splitlines()
    assert [line.split()[0].rstrip(":") for line in lines] == ["wiki", "gcide", "wordnet", "foldoc", "pydoc", "stdlib"]


def test_importing_the_package_registers_the_auto_classes(tmp_path):
    script = (
        "import engrammar, transformers; c = transformers.AutoConfig.for_model('engrammar', vocab_size=8);"
        "print(type(c).__name__, transformers.AutoModelForCausalLM._model_mapping[type(c)].__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["EngrammarConfig", "EngrammarForCausalLM"], done.stderr


@pytest.mark.slow
def test_train_then_generate(tmp_path):
    source = tmp_path / "text.jsonl"
    source.write_text("\n".join(json.dumps({"text": f"Entry {i} says that {i} is a number."}) for i in range(300)))
    out = tmp_path / "run"
    settings = [f"out={out}", f"data.source={source}", f"data.folder={tmp_path / 'data'}", "data.vocab_size=300"]
    settings += ["data.validation_share=0.1", "trainer.max_steps=4", "trainer.eval_strategy=no"]
    done = run("train", "micro", *settings)
    assert done.returncode == 0 and "bits per byte" in done.stdout, done.stderr
    done = run("generate", str(out), "Entry 5", "--max-new-tokens", "5", "--temperature", "0")
    assert done.returncode == 0 and done.stdout.startswith("Entry 5"), done.stderr
    done = run("info", str(out), "--json")
    assert json.loads(done.stdout)["memory_parameters"] > 0
