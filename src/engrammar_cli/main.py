"""The command line. Each command imports what it needs inside, so that `--help` is instant.

It stands beside the package, not in it: `import engrammar` registers the model with transformers' Auto classes, which
takes seconds.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from engrammar_cli.answer import answer
from engrammar_cli.evaluate import evaluate
from engrammar_cli.lab import main as lab_command
from engrammar_cli.table import main as table_command

app = tyro.extras.SubcommandApp()
app.command(name="eval")(evaluate)


@app.command
def train(recipe: Positional[str], overrides: Positional[tuple[str, ...]] = (), /, dry_run: bool = False) -> None:
    """Train a model from a recipe; a run that was killed goes on from its last checkpoint.

    Args:
        recipe: A YAML file, or the name of a recipe that ships: nano, micro, 100m.
        overrides: Settings to replace, as section.setting=value (trainer.max_steps=50).
        dry_run: Print the resolved settings and stop.
    """
    from engrammar.train.exchange import leave_processes
    from engrammar.train.recipe import check_trainer, load_recipe, to_yaml
    from engrammar.train.run import train as run

    resolved = load_recipe(recipe, overrides)
    check_trainer(resolved)
    if dry_run:
        print(to_yaml(resolved), end="")
        return
    result = run(resolved)
    leave_processes()
    if int(os.environ.get("RANK", 0)):
        return
    print(f"{result['steps']} steps, validation {result['validation_bits_per_byte']:.4f} bits per byte: {resolved.out}")


@app.command
def generate(
    model: Positional[Path],
    prompt: Positional[str],
    /,
    max_new_tokens: int = 60,
    temperature: float = 0.8,
    top_p: float = 0.95,
    num_beams: int = 1,
    seed: int = 0,
    memory: Literal["weights", "ram", "disk"] = "weights",
    cache_rows: int = 0,
    on_missing: Literal["error", "skip", "zeros"] = "error",
    deadline: float | None = None,
) -> None:
    """Continue a prompt with a trained model.

    Args:
        model: The folder that training or save_pretrained wrote.
        prompt: Text to continue.
        max_new_tokens: Tokens to add.
        temperature: 0 is greedy.
        top_p: Nucleus of probability to sample from.
        num_beams: More than 1 is beam search.
        seed: Seed of the sampling.
        memory: Where the memory's tables stay: weights of the model, their stored bytes in RAM, or on disk.
        cache_rows: Rows of each table kept in RAM in front of the disk.
        on_missing: A row that cannot be had is an error; its token takes nothing from the memory; or it is zeros.
        deadline: Seconds to wait for a row (needed with skip and zeros).
    """
    from engrammar.train.sample import Sampling, complete, load

    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, num_beams=num_beams, seed=seed
    )
    serving: dict[str, Any] = {}
    if memory != "weights":
        serving = {"memory": memory, "cache_rows": cache_rows, "on_missing": on_missing, "deadline": deadline}
    elif cache_rows or deadline is not None or on_missing != "error":
        raise ValueError("cache-rows, on-missing and deadline are for tables in RAM or on disk: add --memory.")
    print(complete(*load(model, **serving), prompt, sampling))


@app.command
def data(
    source: Positional[str] = "list",
    /,
    out: Path | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    validation_share: float = 0.02,
    cache: Path = Path("data/pocket"),
) -> None:
    """Turn text into token shards, or list the built-in pocket corpora.

    Args:
        source: Files (.txt, .jsonl, .parquet), pocket:NAME, hf:NAME, or "list".
        out: Folder for the shards.
        tokenizer: A Hugging Face tokenizer; without one, a BPE is trained on the text.
        vocab_size: Size of the trained BPE.
        validation_share: Share of entries kept for validation.
        cache: Where pocket corpora are kept.
    """
    from engrammar.train import corpora

    if source == "list":
        for line in corpora.available():
            print(line)
        return
    from engrammar.train.data import prepare

    if out is None:
        raise ValueError("engrammar data needs --out, the folder for the token shards.")
    tokens = prepare(
        source, out=out, tokenizer=tokenizer, vocab_size=vocab_size, validation_share=validation_share, cache=cache
    )
    for split in ("train", "validation"):
        print(f"{split}: {tokens.num_tokens(split):,} tokens of {tokens.num_bytes(split):,} bytes in {out}")


@app.command
def info(model: Positional[str], /, json_output: Annotated[bool, arg(name="json")] = False) -> None:
    """Parameters of a preset or a saved model, and what its memory costs a token.

    Args:
        model: A preset's name, or a folder with a config.json.
        json_output: Print JSON.
    """
    from engrammar.model.budget import count_parameters
    from engrammar.model.configuration import load_config
    from engrammar.model.presets import preset

    config = load_config(Path(model)) if Path(model).is_dir() else preset(model)
    counts = count_parameters(config).to_json()
    if json_output:
        print(json.dumps(counts, indent=1))
        return
    for key, value in counts.items():
        print(f"{key.replace('_', ' '):28} {round(value, 3):,}")


@app.command
def check(
    what: Positional[Literal["reference"]], files: Positional[tuple[Path, ...]], /, tokenizer: Path | None = None
) -> None:
    """Prove that addresses equal a reference to the bit, and outputs within 1e-5; exit 1 on a difference.

    Args:
        what: reference: reference files against the paper's authors' code.
        files: JSON files of the shared reference format.
        tokenizer: Folder with the tokenizer.json that the files were made with; proves the class map too.
    """
    from engrammar_lab.reference_check import check_reference, print_report

    if not files:
        raise ValueError("engrammar check reference needs at least one reference file.")
    reports = [check_reference(file, tokenizer) for file in files]
    for report in reports:
        print_report(report)
    sys.exit(0 if all(report.ok for report in reports) else 1)


@app.command
def bench(
    what: Positional[Literal["hash", "step", "optimizer", "sharded", "placement", "store", "decode"]],
    /,
    quick: bool = False,
    json_output: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Measure, beside a baseline in the same run.

    Args:
        what: hash: ids to rows; step: a training step, with memory and without, and against rows per head; optimizer:
            updates of touched rows; sharded: tables over ranks; placement: tables on the device, in RAM and in a file;
            store: rows from RAM, disk, cache and other machines; decode: tokens/s with tables on disk.
        quick: Finish within 50 seconds.
        json_output: Print JSON.
    """
    from engrammar_lab.bench.report import BENCHES, show

    result = BENCHES[what].run(quick)
    print(json.dumps(result, indent=1)) if json_output else show(result)


@app.command
def demo(
    overrides: Positional[tuple[str, ...]] = (),
    /,
    out: Path = Path("runs/demo"),
    seeds: int = 1,
    recipe: str = "demo",
) -> None:
    """Train the same budget twice, all experts and experts with memory, and show what the memory does.

    Args:
        overrides: Settings to replace, as section.setting=value (data.source=pocket:stdlib needs no download).
        out: Folder for results, pictures and models.
        seeds: Runs of each; quality claims want three.
        recipe: The recipe to train.
    """
    from engrammar.train.recipe import load_recipe
    from engrammar_lab.demo import run_demo

    run_demo(load_recipe(recipe, overrides), out, seeds)


@app.command
def table() -> None:
    """Table files: info, verify, pack, quantize, import, export, plan (engrammar table --help)."""
    table_command(["--help"])


@app.command
def lab() -> None:
    """Studies of what memory buys: run, report (engrammar lab --help)."""
    lab_command(["--help"])


def main() -> None:
    """The entry point."""
    apps = {"table": table_command, "lab": lab_command}  # apps of their own: tyro's do not nest
    if len(sys.argv) > 1 and sys.argv[1] in apps:
        apps[sys.argv[1]](sys.argv[2:])
        return
    answer(app, "engrammar", "Conditional memory for language models.")


if __name__ == "__main__":
    main()
