"""Starts torchtitan's own training of `debug` on a CPU, in several layouts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from engrammar.train.data import TokenSet
from processes import environment
from token_sets import token_set

STEPS, SAVED = 5, 3
# The number of ranks, and settings of torchtitan; FSDP2 shards over the ranks that are left.
LAYOUTS: dict[str, tuple[int, dict[str, int | str]]] = {
    "one rank": (1, {}),
    "FSDP2 on 2": (2, {}),
    "HSDP on 2": (2, {"data_parallel_replicate_degree": 2}),
    "experts over 2": (2, {"expert_parallel_degree": 2}),
    "pipeline 2": (2, {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "Interleaved1F1B"}),
    "all three on 4": (4, {"pipeline_parallel_degree": 2, "expert_parallel_degree": 2}),
}


def command(folder: Path, name: str, layout: str, *arguments: str, torchrun: tuple[str, ...] = ()) -> list[str]:
    """torchrun of titan_cpu.py; the same 8 sequences a step in every layout."""
    num_ranks, settings = LAYOUTS[layout]
    data_ranks = num_ranks // int(settings.get("pipeline_parallel_degree", 1))
    found = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", *torchrun]
    found += [str(Path(__file__).with_name("titan_cpu.py")), str(folder / f"{name}.json"), "--module=engrammar.titan"]
    found += ["--config=debug", f"--dataloader.dataset_path={folder / 'tokens'}", f"--dump_folder={folder / name}"]
    found += [f"--parallelism.{key}={value}" for key, value in settings.items()]
    found += [f"--training.local_batch_size={8 // data_ranks}", f"--training.steps={STEPS}"]
    found += ["--optimizer.rows_eps=1e-3", "--training.mixed_precision_param=float32", "--debug.seed=1"]
    return [*found, *arguments]


def launch(folder: Path, name: str, layout: str, *arguments: str) -> list[dict[str, float]]:
    """What was noted of each step."""
    done = subprocess.run(
        command(folder, name, layout, *arguments), env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return noted(folder, name)


def noted(folder: Path, name: str) -> list[dict[str, float]]:
    notes = folder / f"{name}.json"
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def from_seed(folder: Path, interval: int = SAVED) -> tuple[str, ...]:
    seed = next((folder / "seed" / "checkpoint").iterdir())
    return ("--checkpoint.enable", f"--checkpoint.interval={interval}", f"--checkpoint.initial_load_path={seed}")


def checkpoint(folder: Path, layout: str, step: int = SAVED) -> Path:
    return folder / layout.replace(" ", "-") / "checkpoint" / f"step-{step}"


def go_on(folder: Path, source: str, layout: str) -> list[dict[str, float]]:
    """Resumes the checkpoint of one layout in another, beside a newer one that was not written to its end."""
    name = f"again-{layout.replace(' ', '-')}"
    place = folder / name / "checkpoint"
    place.mkdir(parents=True)
    os.symlink(checkpoint(folder, source), place / f"step-{SAVED}")
    half = place / f"step-{SAVED + 1}"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half of it")
    return launch(folder, name, layout, "--checkpoint.enable", "--checkpoint.interval=100")


def make_tokens(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = (torch.multinomial(1 / torch.arange(1, 510), 20_000, replacement=True, generator=generator) + 3).numpy()
    made = token_set(folder, vocab_size=512, train=ids, validation=ids[:100])
    about = {
        "format": 1, "dtype": made.dtype, "vocab_size": made.vocab_size, "pad_id": 0, "tokenizer_sha256": "",
        "settings": {}, "num_repeated": 0,
        "splits": {
            name: {**vars(info), "shards": [vars(shard) for shard in info.shards]} for name, info in made.splits.items()
        },
    }  # fmt: skip
    (folder / "tokens.json").write_text(json.dumps(about))


def sequences(folder: Path, step: int, length: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 sequences that torchtitan reads in the step after `step` steps, and those of the step after it."""
    tokens = TokenSet.open(folder / "tokens")
    starts = [length * (8 * step + index) for index in range(16)]
    ids = torch.stack([torch.from_numpy(tokens.read("train", start, start + length + 1)) for start in starts])
    return ids[:8], ids[8:]
