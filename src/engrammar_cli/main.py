"""The command line. Each command imports what it needs inside its function, so that `--help` is instant.

It is a package of its own because `import engrammar` registers the model with transformers' Auto classes, which takes
seconds.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from engrammar_cli import edit, lab, plan, table
from engrammar_cli.evaluate import evaluate
from engrammar_cli.explore import explore
from engrammar_cli.extras import Json, by_name, require
from engrammar_cli.serve import serve, vllm
from engrammar_cli.training import attach, train


def generate(
    model: Positional[Path],
    prompt: Positional[str],
    /,
    max_new_tokens: int = 60,
    temperature: float = 0.8,
    top_p: float = 0.95,
    num_beams: int = 1,
    seed: int = 0,
    memory: Literal["weights", "ram", "disk", "remote"] = "weights",
    tables: Path | None = None,
    cache_rows: int = 0,
    on_missing: Literal["error", "skip", "zeros"] = "error",
    deadline: float | None = None,
    name: str | None = None,
    address: str = "127.0.0.1:50051",
    adapter: Path | None = None,
    patch: Path | None = None,
    chat: bool = False,
) -> None:
    """Continue a prompt with a trained model, on an accelerator if there is one.

    Args:
        model: The folder that training or save_pretrained wrote; with --adapter or --patch, a name on the Hub will do.
        prompt: Text to continue.
        max_new_tokens: Tokens to add.
        temperature: 0 is greedy.
        top_p: Share of probability to sample from.
        num_beams: More than 1 is beam search.
        seed: Seed of the sampling.
        memory: Where the memory's tables are: weights of the model, their stored bytes in RAM, on disk, or in a
            Mooncake pool of other machines.
        tables: For a released Qwen4-Exp model, the folder of its tables, which `engrammar table import` made.
        cache_rows: Rows of each table kept in RAM in front of the disk or the pool.
        on_missing: What a row that cannot be read means: an error; its token takes nothing from the memory (skip); or
            the row is zeros.
        deadline: Seconds to wait for a row (needed with skip and zeros).
        name: Name that the tables were uploaded under, for --memory remote.
        address: Address of mooncake_master, as HOST:PORT, for --memory remote.
        adapter: The folder of a memory that was attached to the model; --memory says where its tables are.
        patch: The file of a patch to apply.
        chat: Ask the prompt in the model's chat template, and print the answer alone.
    """
    from engrammar.train.sample import Sampling, complete, load_changed, pool_store

    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, num_beams=num_beams, seed=seed, chat=chat
    )
    if (memory == "remote") != (name is not None):
        raise ValueError("--memory remote and --name go together: name the tables as `engrammar table upload` did.")
    serving: dict[str, Any] = {}
    if memory != "weights":
        where = memory if name is None else pool_store(adapter or tables or model, name, address)
        serving = {"memory": where, "cache_rows": cache_rows, "on_missing": on_missing, "deadline": deadline}
    elif tables or cache_rows or deadline is not None or on_missing != "error":
        raise ValueError(
            "--tables, --cache-rows, --on-missing and --deadline are for tables off the model: add --memory."
        )
    loaded = load_changed(str(model), adapter=adapter, patch=patch, tables=tables, **serving)
    print(complete(*loaded, prompt, sampling))


def data(
    source: Positional[str] = "list",
    /,
    out: Path | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    validation_share: float = 0.02,
    similarity: float | None = None,
    cache: Path = Path("data/pocket"),
) -> None:
    """Turn text into token shards, or list the built-in pocket corpora.

    Args:
        source: Files (.txt, .jsonl, .parquet), pocket:NAME, hf:NAME, or "list".
        out: Folder for the shards.
        tokenizer: A Hugging Face tokenizer; without one, a BPE is trained on the text.
        vocab_size: Size of the trained BPE.
        validation_share: Share of entries kept for validation.
        similarity: Leave out documents that share this much of their word 5-grams with an earlier one (0.8, say).
        cache: Where pocket corpora are kept.
    """
    from engrammar.train import corpora

    if source == "list":
        for line in corpora.available():
            print(line)
        return
    from engrammar.train.data import prepare
    from engrammar.train.recipe import DataRecipe

    if out is None:
        raise ValueError("engrammar data needs --out, the folder for the token shards.")
    recipe = DataRecipe(
        source=source,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_share=validation_share,
        similarity=similarity,
    )
    tokens = prepare(recipe, out=out, cache=cache)
    for split in ("train", "validation"):
        print(f"{split}: {tokens.num_tokens(split):,} tokens of {tokens.num_bytes(split):,} bytes in {out}")


def info(
    model: Positional[str | None] = None,
    /,
    json_output: Json = False,
    advise: tuple[str, str] | None = None,
) -> None:
    """Count the parameters of a preset or a saved model, and what its memory costs a token.

    Args:
        model: A preset's name, or a folder with a config.json.
        advise: Say which share of the idle parameters measurements would make memory, given the tokens of training and
            the parameters that a token does not use (--advise 100B 20B).
    """
    if advise is not None:
        from engrammar.planning.advice import advise as advice
        from engrammar.planning.advice import number, read_measured

        print(advice(number(advise[0]), number(advise[1]), read_measured()))
        return
    if model is None:
        raise ValueError("engrammar info needs a preset or a folder, or --advise TOKENS PARAMETERS.")
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


def verify(folder: Positional[Path], /) -> None:
    """Read every byte of a checkpoint, or of a folder of tables, and compare it with its checksum.

    Args:
        folder: What training, save_pretrained, pack or quantize wrote.
    """
    from engrammar.tables.verify import verify_folder

    started = time.perf_counter()
    found = verify_folder(folder)
    seconds = time.perf_counter() - started
    speed = f"{seconds:.1f} s, {seconds / max(found.num_bytes, 1) * 1e9:.1f} s a GB"
    print(f"{folder}: {found.num_bytes:,} bytes are as they were written ({speed})")
    if found.without_sums:
        print(f"without a checksum: {', '.join(found.without_sums)}")


def check(
    what: Positional[Literal["reference"]], files: Positional[tuple[Path, ...]], /, tokenizer: Path | None = None
) -> None:
    """Check that addresses equal a reference to the bit, and outputs within 1e-5; exit with 1 on a difference.

    Args:
        what: Compare with reference files, which the code of the paper's authors made.
        files: JSON files in the format of docs/reference.md.
        tokenizer: Folder with the tokenizer.json that the files were made with; checks the class map too.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from engrammar_lab.reference_check import check_reference, print_report

    if not files:
        raise ValueError("engrammar check reference needs at least one reference file.")
    reports = [check_reference(file, tokenizer) for file in tqdm(files, desc="checking", delay=2, leave=False)]
    for report in reports:
        print_report(report)
    sys.exit(0 if all(report.ok for report in reports) else 1)


def bench(
    what: Positional[
        Literal["hash", "step", "optimizer", "sharded", "placement", "store", "decode", "attach", "edit", "serve"]
    ],
    /,
    quick: bool = False,
    json_output: Json = False,
) -> None:
    """Measure a part of the library beside a baseline of the same run.

    Args:
        what: hash: ids to rows; step: a training step, with memory and without, and against rows per head; optimizer:
            updates of touched rows; sharded: tables over ranks; placement: tables on the device, in RAM and in a file;
            store: rows from RAM, disk, cache and other machines; decode: tokens/s with tables on disk;
            attach: what a memory costs a model that it is attached to; edit: what patches cost a model, by their keys;
            serve: answers to many requests at once.
        quick: Finish within 50 seconds.
    """
    require("lab")
    from engrammar_lab.bench.report import run, show

    result = run(what, quick)
    print(json.dumps(result, indent=1)) if json_output else show(what, result)


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
    require("lab")
    from engrammar.train.recipe import load_recipe
    from engrammar_lab.demo import run_demo

    run_demo(load_recipe(recipe, overrides), out, seeds)


COMMANDS: dict[str, Callable[..., None] | dict[str, Callable[..., None]]] = {
    **by_name(train, attach, generate, serve, vllm, data, info, verify),
    "table": table.COMMANDS,
    "plan": plan.COMMANDS,
    "eval": evaluate,
    "lab": lab.COMMANDS,
    "edit": edit.COMMANDS,
    **by_name(explore, check, bench, demo),
}
GROUPS = {
    "table": "Files of memory tables: look, check, repack, plan.",
    "plan": "What a training costs, before machines are rented.",
    "lab": "Studies of what memory buys.",
    "edit": "Facts as patches: learn, show, check, apply, undo, forget.",
}
DESCRIPTION = """Conditional memory for language models.

A mistake is one sentence; ENGRAMMAR_TRACEBACK=1 shows the traceback too. --version prints the version."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command that `args` name; by default `args` are the process's own."""
    args = sys.argv[1:] if args is None else args
    if list(args) == ["--version"]:
        print(version("engrammar"))
        return
    try:
        check_commands(args)
        build_app(COMMANDS).cli(
            prog="engrammar", description=DESCRIPTION, args=args, config=(tyro.conf.FlagCreatePairsOff,)
        )
    except (ValueError, OSError) as error:
        if os.environ.get("ENGRAMMAR_TRACEBACK"):
            traceback.print_exc()
        print(f"engrammar: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def build_app(commands: Mapping[str, Any]) -> tyro.extras.SubcommandApp:
    """The commands, and groups of commands, as a tyro app."""
    app = tyro.extras.SubcommandApp()
    for name, command in commands.items():
        if isinstance(command, Mapping):
            app.command(build_app(command), name=name, help=GROUPS[name])
        else:
            app.command(name=name)(command)
    return app


def check_commands(args: Sequence[str]) -> None:
    """Checks the command's name, because tyro answers an unknown one before `--help` with help and exit code 0.

    Raises:
        ValueError: `args` begin with a command that does not exist, or end before a command is named.
    """
    commands: Any = COMMANDS
    before = "engrammar"
    for name in args:
        if not isinstance(commands, Mapping) or name.startswith("-"):
            return
        if name not in commands:
            raise ValueError(f"There is no command '{before} {name}'; commands: {', '.join(commands)}.")
        commands, before = commands[name], f"{before} {name}"
    if isinstance(commands, Mapping):
        raise ValueError(f"Which command of {before}? Name one of {', '.join(commands)}, or add --help.")


if __name__ == "__main__":
    main()
