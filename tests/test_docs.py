"""What the README and docs/ tell a reader to run runs: Python is executed, commands are parsed, names exist."""

import functools
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from engrammar.train.recipe import load_recipe
from engrammar.train.run import train
from engrammar_cli import main as command_line
from engrammar_lab.bench.loopback import LoopbackPool, why_no_pool
from tasks_models import write_corpora

ROOT = Path(__file__).parent.parent
PAST = {"docs/log.md", "docs/measurements.md"}  # what was decided and measured, of the code as it was then
PAGES = ["README.md", *sorted({f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - PAST)]
MODELS = ("runs/nano", "runs/demo/moe-memory-0")  # the folders that pages speak of
ANY_TOKENIZER = "gpt2"  # what the first screen names; here it is a folder
ANY_MODEL = "HuggingFaceTB/SmolLM2-135M"  # what a memory is attached to; here it is a folder
POOL = "127.0.0.1:50051"
FLAG = re.compile(r"--[a-z-]+")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """What the pages' examples start from: a small trained model, a text, pocket corpora that are downloaded."""
    folder = tmp_path_factory.mktemp("reader")
    write_corpora(folder / "data" / "pocket")
    data = {"source": "pocket:wiki", "folder": folder / "data", "vocab_size": 4096, "limit_documents": "null"}
    trainer = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": "true"}
    settings = [f"data.{name}={value}" for name, value in data.items()]
    settings += [f"trainer.{name}={value}" for name, value in trainer.items()]
    train(load_recipe("micro", [f"out={folder / MODELS[0]}", *settings]))
    shutil.copytree(folder / MODELS[0], folder / MODELS[1])
    shutil.copytree(folder / MODELS[0], folder / ANY_TOKENIZER)
    save_any_model(folder / ANY_MODEL, AutoTokenizer.from_pretrained(folder / MODELS[0]))
    shutil.copytree(folder / "data" / "pocket-wiki-4096", folder / "tokens" / "wiki")
    shutil.copytree(folder / "data" / "pocket", folder / "cache")
    (folder / "fast-disk").mkdir()
    return folder


def save_any_model(folder: Path, tokenizer) -> None:
    """A model of transformers with the depth of SmolLM2-135M, and nothing else of it."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=30, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_of_a_page_runs(page, folders, tmp_path, monkeypatch):
    """The blocks of a page, in order and in one namespace, in a folder that holds what they start from."""
    place = shutil.copytree(folders, tmp_path / "reader")
    monkeypatch.chdir(place)
    code = "\n".join(blocks(page, "python"))
    if POOL not in code:
        exec(compile(code, page, "exec"), {"__name__": page})
        return
    if (missing := why_no_pool()) is not None:
        pytest.skip(missing)
    with LoopbackPool() as pool:
        command_line.main(["table", "upload", "runs/nano", "nano", "--address", pool.server.address])
        exec(compile(code.replace(POOL, pool.server.address), page, "exec"), {"__name__": page})


def test_the_first_screen_is_an_install_and_ten_lines():
    readme, first = (ROOT / "README.md").read_text(), blocks("README.md", "python")[0]
    assert readme.index("pip install .") < readme.index(first) < readme.index("make demo")
    assert f'from_pretrained("{ANY_TOKENIZER}")' in first and len(list(filter(None, first.splitlines()))) <= 10


def commands(page: str) -> list[list[str]]:
    """The arguments of each `engrammar ...` in a page's shell blocks, as the shell would give them."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[place + 1 :] for line in words for place, word in enumerate(line) if Path(word).name == "engrammar"]


def silenced(commands: Mapping) -> dict:
    """The same commands, doing nothing."""

    def silence(command):
        return functools.wraps(command)(lambda *args, **kwargs: None)

    return {name: silenced(what) if isinstance(what, Mapping) else silence(what) for name, what in commands.items()}


@pytest.mark.parametrize(
    "args", [pytest.param(args, id=f"{page}: {' '.join(args)}") for page in PAGES for args in commands(page)]
)
def test_commands_of_the_pages_are_accepted(args, monkeypatch):
    monkeypatch.setattr(command_line, "COMMANDS", silenced(command_line.COMMANDS))
    command_line.main(args)


def test_a_command_with_a_wrong_flag_is_not_accepted(monkeypatch):
    with pytest.raises(SystemExit) as ended:
        test_commands_of_the_pages_are_accepted(["verify", "runs/nano", "--quickly"], monkeypatch)
    assert ended.value.code == 2


@pytest.mark.parametrize("page", PAGES)
def test_commands_named_in_the_text_exist(page, capsys):
    """`engrammar table pack OLD NEW` and the like: the command, and each flag in its help."""
    for text in re.findall(r"`(?:\.venv/bin/)?engrammar ([^`]+)`", (ROOT / page).read_text()):
        known, path = command_line.COMMANDS, []
        for word in text.replace("\\", "").split():
            if isinstance(known, Mapping):
                names = word.split("|")
                assert set(names) <= set(known), f"engrammar {text}"
                path.append(names[0])
                known = known[names[0]]
        if flags := set(FLAG.findall(text)):
            with pytest.raises(SystemExit):
                command_line.main([*path, "--help"])
            assert flags <= set(FLAG.findall(capsys.readouterr().out)), f"engrammar {text}"


def test_the_readme_names_every_command():
    named = re.findall(r"`(?:\.venv/bin/)?engrammar (\w+)", (ROOT / "README.md").read_text())
    assert set(named) == set(command_line.COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_shell_blocks_are_shell(page):
    for block in blocks(page, "sh"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)


@pytest.mark.parametrize("page", [*PAGES, *sorted(PAST), "CONTRIBUTING.md"])
def test_links_between_pages_lead_somewhere(page):
    path = ROOT / page
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()) if "://" not in link]
    assert all((path.parent / link).exists() for link in links), links


@pytest.mark.parametrize("page", PAGES)
def test_files_and_names_of_the_code_exist(page):
    text = (ROOT / page).read_text()
    for file in re.findall(r"\b[a-z_]+/[a-z_/]+\.(?:py|md)\b", text):
        assert any((ROOT / above / file).exists() for above in ("", "src", "src/engrammar", "docs")), file
    for name in set(re.findall(r"\bengrammar(?:_lab|_cli)?(?:\.[A-Za-z_]+)+", text)):
        resolve(name)


def resolve(name: str) -> object:
    """A module, or what is in one, from its dotted name."""
    module, _, rest = name.partition(".")
    found = importlib.import_module(module)
    for part in rest.split("."):
        found = sys.modules.get(module, found)  # `engrammar.attach` is a function and a package
        module = f"{module}.{part}"
        found = getattr(found, part, None) or importlib.import_module(module)
    return found
