"""Half an hour of served models as people use them, with faults: what clients got, and whether any token was wrong.

`engrammar serve` runs in a process of its own, three times: with rows on disk, in a pool of other machines, and in RAM
with patches that come and go. Clients ask for greedy tokens of `nano` with random weights, and compare them with those
of `generate`. Prompts at which the two best tokens are nearly equal somewhere are left out.
Remake: python -m engrammar_lab.bench.load
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from transformers import AutoTokenizer

from engrammar.cells import Lines
from engrammar.edit import ExactEntry, apply_patch, base_of, build_patch, undo_patch, write_patch
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.off import memory_off
from engrammar.tables.folder import open_tables
from engrammar.tables.sealed import write_text
from engrammar.train.data import train_tokenizer
from engrammar.train.documents import read_documents
from engrammar.train.sample import load
from engrammar_lab.bench.load_clients import NUM_NEW, Clients, Prompt, count
from engrammar_lab.bench.load_faults import changing, damaged, killed, read_ms, replaced, send, slow_disk
from engrammar_lab.bench.loopback import LoopbackPool, free_port, wait_for_port, why_no_pool
from engrammar_lab.machine import describe_run

CORPUS, VOCABULARY = "pocket:stdlib", 1000
CACHE_ROWS = "2000"  # fewer than the prompts read, so that the disk and the pool are asked all the time
NAME, TOKEN = "load", "0123456789abcdef"
LENGTHS = (1, 3, 8, 30, 60, 200)  # tokens of prompts
APART = 1e-4  # how far the best token of a prompt's answer is at least above the second
START_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is asked."""

    minutes: float = 30.0  # of all phases together
    rows_per_head: int = 400_000  # rows of each head of the tables
    prompts: int = 96  # different prompts
    clients: int = 8  # requests at once
    pause: float = 1.0  # seconds between an answer and a client's next request, on average


class Phase(NamedTuple):
    """A part of a server's life: how long it lasts, as a share of the whole test, and what is wrong meanwhile."""

    name: str
    share: float
    fault: AbstractContextManager[object]


class Served(NamedTuple):
    """A server that runs."""

    url: str
    process: subprocess.Popen[str]

    def facts(self) -> dict[str, float]:
        """Memory, open files and threads of the process, and its counters."""
        own = psutil.Process(self.process.pid)
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            lines = [line.rpartition(" ") for line in response.read().decode().splitlines() if line[0] != "#"]
        held = {"rss_mb": own.memory_info().rss / 2**20, "open_files": own.num_fds(), "threads": own.num_threads()}
        return held | {name.removeprefix("engrammar_"): float(value) for name, _, value in lines}


def make_model(folder: Path, rows_per_head: int) -> None:
    """`nano` with random weights, gates and convolutions, and a tokenizer of its own."""
    documents = list(islice(read_documents(CORPUS, cache=Path("data/pocket")), 100))
    train_tokenizer(documents, vocab_size=VOCABULARY, path=folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    memory = {"rows_per_head": [rows_per_head, rows_per_head], "row_encoding": "fp32"}
    model = EngrammarForCausalLM.from_preset("nano", tokenizer=tokenizer, memory=memory)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv" in name:
                parameter.normal_(std=0.5)
            elif "memory" in name:
                parameter.normal_()
    model.save_pretrained(folder)


def make_patch(model: Any, tokenizer: Any, prompts: Sequence[Tensor], path: Path) -> None:
    """A patch that adds a random vector wherever a token stands that is one of the first four of a prompt."""
    classes = model.model.memory.class_of_id
    keys = sorted({int(classes[token]) for ids in prompts for token in ids[:4]})
    values = 9 * torch.randn(len(keys), 1, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    entries = [ExactEntry(key=(key,), block=1, values=value) for key, value in zip(keys, values)]
    write_patch(build_patch("changes", base_of(model, tokenizer), entries), path)


@torch.no_grad()
def greedy(model: Any, ids: Tensor) -> tuple[list[int], float]:
    """The longest answer to a prompt, and how far its best token is above the second, at least."""
    made = model.generate(
        ids[None], max_new_tokens=max(NUM_NEW), do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    best = torch.stack([scores[0].topk(2).values for scores in made.scores])
    return made.sequences[0, len(ids) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def make_prompts(folder: Path, number: int, patch: Path) -> tuple[list[Prompt], dict[str, Any]]:
    """Prompts of real text with what `generate` says to them: as the model is, and with the patch.

    Returns:
        the prompts, and how many of them the memory and the patch matter for.
    """
    model, tokenizer = load(folder, device="cpu")
    model.generation_config.eos_token_id = None
    documents = read_documents(CORPUS, cache=Path("data/pocket"))
    taken = [torch.tensor(tokenizer(text).input_ids) for text in islice(documents, 2 * number)]
    cut = [ids[: LENGTHS[index % len(LENGTHS)]] for index, ids in enumerate(taken)]
    own = {tuple(ids.tolist()): greedy(model, ids) for ids in cut if len(ids)}
    make_patch(model, tokenizer, cut, patch)
    with memory_off(model):
        off = {ids: greedy(model, torch.tensor(ids))[0] for ids in own}
    apply_patch(model, patch, tokenizer)
    changed = {ids: greedy(model, torch.tensor(ids)) for ids in own}
    undo_patch(model, "changes")
    all_sure = [ids for ids in own if min(own[ids][1], changed[ids][1]) > APART]
    sure = all_sure[:number]
    prompts = [Prompt([*ids], (own[ids][0], changed[ids][0])) for ids in sure]
    about = {
        "prompts": len(prompts),
        "left_out": len(own) - len(all_sure),
        "other_without_memory": sum(off[ids] != own[ids][0] for ids in sure),
        "other_with_patch": sum(changed[ids][0] != own[ids][0] for ids in sure),
    }
    assert about["other_without_memory"] and about["other_with_patch"], "nothing would be seen"
    return prompts, about


def serving(folder: Path, *settings: str) -> AbstractContextManager[Served]:
    """`engrammar serve`, `started`."""
    return started([sys.executable, "-m", "engrammar_cli.main", "serve", str(folder), "--served-name", NAME, *settings])


@contextmanager
def started(command: Sequence[str], **variables: str) -> Iterator[Served]:
    """A server in a process of its own, at a port that is free, with other variables of the environment.

    Raises:
        OSError: it does not start, or does not end as it should.
    """
    port = free_port()
    with TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with log.open("w") as out:
            asked, given = [*command, "--port", str(port)], os.environ | variables
            process = subprocess.Popen(asked, stdout=out, stderr=out, text=True, env=given)
        try:
            try:
                wait_for_port(port, process, START_SECONDS)
            except OSError as error:
                raise OSError(f"The server does not start: {log.read_text()[-2000:]}") from error
            yield Served(f"http://127.0.0.1:{port}", process)
        finally:
            process.send_signal(signal.SIGINT)
            ended = process.wait(START_SECONDS)
        if ended:
            raise OSError(f"The server ended with {ended}: {log.read_text()[-2000:]}")


def run_phases(served: Served, prompts: Sequence[Prompt], plan: Plan, phases: Sequence[Phase], path: Path) -> list[Any]:
    """What clients got in each phase, what the server's process held at its end, and how long a page of `path` took."""
    found = []
    with Clients(served.url, NAME, prompts, number=plan.clients, pause=plan.pause) as clients:
        for phase in phases:
            started = time.monotonic()
            with phase.fault:
                time.sleep(plan.minutes * 60 * phase.share)
                latency = read_ms(path)
            clients.got, got = [], clients.got  # what ended since the phase began, and while it was mended
            seconds = time.monotonic() - started
            found.append({"phase": phase.name, "page_read_ms": latency, **count(got, seconds), **served.facts()})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def tables_of(folder: Path) -> Path:
    """The one file that holds a model's tables."""
    (path,) = {shard.path for table in open_tables(folder).tables.values() for shard in table.shards}
    return path


def on_disk(folder: Path, prompts: Sequence[Prompt], plan: Plan) -> list[Any]:
    """Rows on disk behind a small cache: a busy disk, and files that are damaged."""
    path = tables_of(folder)
    with serving(folder, "--memory", "disk", "--cache-rows", CACHE_ROWS) as served:
        phases = [
            Phase("nothing wrong", 5 / 30, nullcontext()),
            Phase("the disk is busy", 3 / 30, slow_disk(path)),
            Phase("a damaged file takes the table's place", 2 / 30, replaced(path)),
            Phase("the table is damaged where it is", 2 / 30, damaged(path)),
            Phase("mended", 3 / 30, nullcontext()),
        ]
        return run_phases(served, prompts, plan, phases, path)


def in_pool(folder: Path, prompts: Sequence[Prompt], plan: Plan) -> list[Any]:
    """Rows in a pool of other machines, which is killed and started again. Needs Mooncake."""
    with LoopbackPool("1GB") as pool:
        send(pool, folder, NAME)
        settings = ("--memory", "remote", "--name", NAME, "--address", pool.server.address, "--cache-rows", CACHE_ROWS)
        with serving(folder, *settings) as served:
            phases = [
                Phase("nothing wrong", 3 / 30, nullcontext()),
                Phase("the pool is killed", 2 / 30, killed(pool, folder, NAME)),
                Phase("started again", 3 / 30, nullcontext()),
            ]
            return run_phases(served, prompts, plan, phases, tables_of(folder))


def patched(folder: Path, prompts: Sequence[Prompt], plan: Plan, patch: Path) -> list[Any]:
    """Rows in RAM, and a patch that comes and goes: each answer is one of two, whole."""
    token = patch.with_name("token")
    token.write_text(TOKEN)
    with serving(folder, "--memory", "ram", "--token-file", str(token)) as served:
        phases = [
            Phase("nothing wrong", 3 / 30, nullcontext()),
            Phase("a patch comes and goes", 2 / 30, changing(served.url, TOKEN, patch)),
            Phase("undone", 2 / 30, nullcontext()),
        ]
        return run_phases(served, prompts, plan, phases, tables_of(folder))


def measure(plan: Plan) -> dict[str, Any]:
    """All servers, one after the other.

    Returns:
        `servers`: per place of the rows, what clients got in each phase.
    """
    with TemporaryDirectory() as scratch:
        folder, patch = Path(scratch) / "model", Path(scratch) / "changes.safetensors"
        make_model(folder, plan.rows_per_head)
        prompts, about = make_prompts(folder, plan.prompts, patch)
        before = [Prompt(prompt.ids, prompt.says[:1]) for prompt in prompts]
        servers = {"disk": on_disk(folder, before, plan)}
        if why_no_pool() is None:
            servers["pool"] = in_pool(folder, before, plan)
        servers["RAM"] = patched(folder, prompts, plan, patch)
    return {
        **describe_run("python -m engrammar_lab.bench.load"),
        "shapes": f"nano with random weights and {plan.rows_per_head:,} rows a head, fp32; {plan.clients} clients, "
        f"{plan.pause:g} s between an answer and the next request; prompts of {LENGTHS[0]} to {LENGTHS[-1]} tokens, "
        f"answers of {', '.join(map(str, NUM_NEW))}; {plan.minutes:g} minutes",
        "about": about,
        "servers": servers,
    }


def table(result: dict[str, Any]) -> tuple[list[str], Lines]:
    """Header and lines, one for each server and phase."""
    header = ["rows", "phase", "requests", "right", "gone away", "wrong", "errors", "p50 s", "p99 s", "MB", "files"]
    lines = []
    for name, phases in result["servers"].items():
        for phase in phases:
            errors = ", ".join(f"{number} x {how}" for how, number in phase["errors"].items()) or "0"
            took = ["–" if (one := phase[key]) is None else f"{one:.2f}" for key in ("median_seconds", "p99_seconds")]
            counted = [str(phase[key]) for key in ("requests", "right", "cancelled", "wrong tokens")]
            held = [f"{phase['rss_mb']:.0f}", f"{phase['open_files']:.0f}"]
            lines.append([name, phase["phase"], *counted, errors, *took, *held])
    return header, lines


def verdict(result: dict[str, Any]) -> str:
    """How many answers were wrong, what faults led to, and what the processes held at the end."""
    phases = [phase for server in result["servers"].values() for phase in server]
    asked, wrong = (sum(phase[key] for phase in phases) for key in ("requests", "wrong tokens"))
    missing = sum(server[-1].get("rows_missing_total", 0) for server in result["servers"].values())
    about = result["about"]
    grown = "; ".join(
        f"{name}: {server[0]['rss_mb']:.0f} and {server[-1]['rss_mb']:.0f} MB"
        for name, server in result["servers"].items()
    )
    quiet, busy = (result["servers"]["disk"][index]["page_read_ms"] for index in (0, 1))
    return (
        f"Of {asked:,} answers {wrong} had a wrong token, and {missing:.0f} rows were zeroed in silence. Without the "
        f"memory {about['other_without_memory']} of {about['prompts']} answers would be others, with the patch "
        f"{about['other_with_patch']}; {about['left_out']} prompts were left out, since two tokens are nearly equal in "
        f"their answers. A page is read in {quiet:.2f} ms, and in {busy:.2f} from the busy disk. Rows of a damaged "
        "page, or of a pool that is gone, end the answers that need them with an error. A server does not see that a "
        f"file was replaced, since it has the old one open. Memory after the first phase and at the end: {grown}."
    )


def main(out: Path = Path("results/bench/load.json"), minutes: float = 30.0) -> None:
    """Runs the load test.

    Args:
        out: The JSON to write.
        minutes: How long it takes in all.
    """
    write_text(out, json.dumps(measure(Plan(minutes=minutes)), indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
