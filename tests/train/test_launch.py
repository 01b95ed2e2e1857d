"""The commands of docs/launch.md for one machine run as they are written, on two ranks and in small."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from processes import COMMANDS, environment
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


@pytest.mark.slow
def test_the_commands_for_one_machine_run(tmp_path):
    write_corpora(tmp_path / "data" / "pocket")
    lines = [shlex.split(line) for line in blocks("docs/launch.md", "sh")[0].splitlines()]
    assert [line[0] for line in lines] == ["engrammar", "torchrun", "engrammar", "engrammar"]
    for line in lines:
        done = subprocess.run(
            in_small(line), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, (line, done.stderr[-3000:])
    assert (tmp_path / "runs" / "first" / "result.json").exists()
    again = subprocess.run(in_small(lines[1]), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert "2 steps, validation" in again.stdout  # not repeated
    assert shutil.which("torchrun", path=COMMANDS) and Path(tmp_path / "tokens" / "wiki" / "tokens.json").exists()
