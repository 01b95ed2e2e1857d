"""The commands of docs/launch.md for one machine run as they are written, on two ranks and in small."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from engrammar_cli.main import main
from processes import COMMANDS, environment, succeed_on_ranks
from tasks_models import write_corpora
from test_docs import blocks

SMALL = (
    "data.folder=data", "data.vocab_size=400", "data.sequence_length=32", "data.batch_size=4",
    "data.limit_documents=40", "trainer.max_steps=2", "trainer.save_strategy=no", "trainer.eval_strategy=no",
)  # fmt: skip


def in_small(words: list[str]) -> list[str]:
    """The command on two ranks, with a smaller model and text; nothing else of it changes."""
    if words[0] == "torchrun":
        assert "--nproc-per-node" in words and "nano" in words and "engrammar" in words
        words = [{"8": "2", "nano": "micro"}.get(word, word) for word in words] + [*SMALL]
    return [str(COMMANDS / word) if word in ("torchrun", "engrammar") else word for word in words]


def run_line(words: list[str]) -> None:
    """torchrun starts its own processes; a command alone is called in this one."""
    if words[0] == "torchrun":
        done = subprocess.run(in_small(words), env=environment(), capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, (words, done.stderr[-3000:])
    else:
        assert words[0] == "engrammar"
        main(words[1:])


@pytest.mark.slow
def test_the_commands_for_one_machine_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path / "data" / "pocket")
    lines = [shlex.split(line) for line in blocks("docs/launch.md", "sh")[0].splitlines()]
    assert [line[0] for line in lines] == ["engrammar", "torchrun", "engrammar", "engrammar"]
    for line in lines:
        run_line(line)
    assert (tmp_path / "runs" / "first" / "result.json").exists()
    launched = in_small(lines[1])
    given_again = launched[launched.index(str(COMMANDS / "engrammar")) + 1 :]
    succeed_on_ranks(2, tmp_path, main, given_again)  # forks: what torchrun starts was seen above
    assert "2 steps, validation" in (tmp_path / "rank-0.log").read_text()  # not repeated
    assert shutil.which("torchrun", path=COMMANDS) and Path(tmp_path / "tokens" / "wiki" / "tokens.json").exists()
