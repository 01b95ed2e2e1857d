"""What the command line promises: quick help, JSON keys, one sentence for a mistake, an exit code that tells."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engrammar_cli.main import COMMANDS, main
from models import save_micro, tiny_model

ROOT = Path(__file__).parents[2]
COMMAND = [str(Path(sys.executable).parent / "engrammar")]


def run(*arguments: str) -> subprocess.CompletedProcess:
    """The command as a user starts it, which takes seconds to load torch."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that is not trained, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save_micro(folder)
    return folder


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


def every_command() -> list[list[str]]:
    groups = [[name] for name, command in COMMANDS.items() if isinstance(command, dict)]
    return [[], *([name] for name in COMMANDS), *([name, inner] for (name,) in groups for inner in COMMANDS[name])]


def test_the_version_is_printed(call):
    code, out, _ = call("--version")
    assert code == 0 and re.fullmatch(r"\d+\.\d+\.\d+\S*\n", out)


def test_help_imports_no_tensor_library():
    code = f"""
import contextlib, io, sys
from engrammar_cli.main import COMMANDS, main
for command in {every_command()}:
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert shown.getvalue().startswith(" ".join(["usage: engrammar", *command])), command
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {"tyro", "engrammar_cli"} <= (loaded := set(done.stdout.split()))
    assert not loaded & {"engrammar", "engrammar_lab", "torch", "transformers", "numpy", "tokenizers", "tqdm", "yaml"}


@pytest.mark.parametrize("behind", [(), ("--help",), ("x", "--seed", "1")])
@pytest.mark.parametrize(("group", "name"), [((), "nope"), (("table",), "nope"), (("lab",), "info")])
def test_an_unknown_command_is_one_sentence_and_exit_code_2(call, group, name, behind):
    code, shown, errors = call(*group, name, *behind)
    named = " ".join(["engrammar", *group, name])
    assert (code, shown) == (2, "")
    assert re.fullmatch(rf"engrammar: There is no command '{named}'; commands: .*\.\n", errors)


@pytest.mark.parametrize("group", [(), ("table",), ("lab",)])
def test_no_command_is_one_sentence_and_exit_code_2(call, group):
    code, shown, errors = call(*group)
    assert (code, shown) == (2, "") and errors.startswith("engrammar: Which command of ") and errors.count("\n") == 1


def test_the_traceback_of_a_mistake_can_be_seen(call, monkeypatch):
    assert "ENGRAMMAR_TRACEBACK=1" in call("--help")[1]
    monkeypatch.setenv("ENGRAMMAR_TRACEBACK", "1")
    code, _, errors = call("info", "giga")
    assert code == 2 and "Traceback" in errors and "presets.py" in errors
    assert errors.splitlines()[-1].startswith("engrammar: There is no preset 'giga'")


def test_an_error_of_many_lines_is_shown_as_one(call, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("The disk\n  is full.")

    monkeypatch.setattr("engrammar.model.presets.preset", fail)
    assert call("info", "nano") == (2, "", "engrammar: The disk is full.\n")


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        *(("matplotlib", "lab", command) for command in (("demo",), ("bench", "hash"), ("lab", "report"))),
        ("scipy", "lab", ("lab", "rerun", "pair", "moe")),
        ("lm_eval", "eval", ("eval", "model")),
    ],
)
def test_a_missing_extra_is_one_sentence(call, monkeypatch, module, extra, command):
    monkeypatch.setitem(sys.modules, module, None)
    code, _, errors = call(*command)
    assert code == 2
    assert errors == f"engrammar: This command needs {module}: pip install 'engrammar[{extra}]'.\n"


@pytest.mark.slow
def test_core_commands_work_without_the_extras(folder, golden, tmp_path):
    absent = ["matplotlib", "fpdf", "scipy", "PIL", "rich", "datasets", "pyarrow", "lm_eval", "sklearn", "pandas"]
    lines = [json.dumps({"text": f"Entry {i} says that {i} is a number."}) for i in range(50)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    code = f"""
import sys
sys.modules |= dict.fromkeys({absent})  # as if they were not installed
import engrammar
from engrammar_cli.main import COMMANDS, main
for command in (
    ["train", "micro", "--dry-run"],
    ["info", "nano"],
    ["info", r"{folder}"],
    ["generate", r"{folder}", "To be", "--max-new-tokens", "2"],
    ["table", "info", r"{folder}"],
    ["verify", r"{folder}"],
    ["table", "quantize", r"{folder}", "small", "--encoding", "int8"],
    ["data", "text.jsonl", "--out", "tokens", "--vocab-size", "300", "--validation-share", "0.5"],
    ["table", "plan", r"{folder}", "text.jsonl", "plan"],
    ["check", "reference", r"{golden / "reference_small.json"}"],  # exits by itself, so it is last
):
    print("#", *command)
    main(command)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# check reference" in done.stdout and "DIFFERS" not in done.stdout
    assert "plan.png is not drawn" in done.stderr and "pip install 'engrammar[lab]'" in done.stderr
    assert not (tmp_path / "plan" / "plan.png").exists() and (tmp_path / "plan" / "plan.json").exists()


def test_what_core_commands_print_fits_80_columns(call, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 9)
    speeds = {"ram_rows_per_s": 123_456_789, "disk_reads_per_s": 5e4, "compute_tokens_per_s": 12_345_678}
    (tmp_path / "machine.json").write_text(json.dumps(speeds))
    plan = ["plan", str(folder), str(tmp_path / "text.txt"), str(tmp_path), "--machine", str(tmp_path / "machine.json")]
    monkeypatch.setattr("engrammar.planning.report.draw", lambda *args: None)
    for command in (
        ["info", "engram-40b"],
        ["table", "info", str(folder)],
        ["table", *plan, "--tokens-per-s", "1000000", "--hit-rate", "1"],
    ):
        code, shown, errors = call(*command)
        lines = [line for line in shown.splitlines() if str(tmp_path.parent) not in line]
        assert code == 0 and len(lines) > 1, errors
        assert not [line for line in lines if len(line) > 80], command


def test_info_speaks_json(call):
    counts = json.loads(call("info", "engram-27b", "--json")[1])
    assert counts["memory_parameters"] == 5_792_338_560
    assert {"total_parameters", "active_parameters", "memory_rows", "bytes_per_token"} <= counts.keys()
    assert "memory rows                  72,404,232" in call("info", "engram-27b")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "tests", "Hello", "--memory", "remote"), "--memory remote and --name go together"),
        (("generate", "tests", "Hello", "--name", "nano"), "--memory remote and --name go together"),
        (("generate", "tests", "Hello", "--cache-rows", "9"), "add --memory"),
        (("generate", "tests", "Hello", "--tables", "tables"), "add --memory"),
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


@pytest.mark.slow
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
        ("tokenizer.json", "{", "holds no tokenizer"),
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
    assert [line.split()[0].rstrip(":") for line in lines] == [
        "wiki",
        "gcide",
        "wordnet",
        "foldoc",
        "pydoc",
        "stdlib",
        "perl",
        "aws",
        "sympy",
    ]


@pytest.mark.slow
def test_importing_the_package_registers_the_auto_classes(tmp_path):
    script = (
        "import engrammar, transformers; c = transformers.AutoConfig.for_model('engrammar', vocab_size=8);"
        "print(type(c).__name__, transformers.AutoModelForCausalLM._model_mapping[type(c)].__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["EngrammarConfig", "EngrammarForCausalLM"], done.stderr


@pytest.mark.slow
def test_train_then_generate(call, tmp_path):
    source = tmp_path / "text.jsonl"
    source.write_text("\n".join(json.dumps({"text": f"Entry {i} says that {i} is a number."}) for i in range(300)))
    out = tmp_path / "run"
    settings = [f"out={out}", f"data.source={source}", f"data.folder={tmp_path / 'data'}", "data.vocab_size=300"]
    settings += ["data.validation_share=0.1", "trainer.max_steps=4", "trainer.eval_strategy=no"]
    code, said, errors = call("train", "micro", *settings)
    assert code == 0 and "bits per byte" in said, errors
    code, said, errors = call("generate", str(out), "Entry 5", "--max-new-tokens", "5", "--temperature", "0")
    assert code == 0 and said.startswith("Entry 5"), errors
    assert json.loads(call("info", str(out), "--json")[1])["memory_parameters"] > 0
