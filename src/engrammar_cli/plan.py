"""`engrammar plan ...`: what a training will cost. Imports are inside the functions, as in `main.py`."""

import json
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from engrammar_cli.extras import Json, by_name


def rows(
    model: Positional[str],
    corpus: Positional[str],
    /,
    out: Path | None = None,
    tokenizer: Path | None = None,
    tokens_per_gpu: tuple[int, ...] = (4096, 16_384, 65_536),
    sequence: int = 4096,
    sample: int = 1_000_000,
    cache: Path = Path("data/pocket"),
) -> None:
    """Count which share of the rows that a training step looks up are distinct, in a corpus.

    Args:
        model: A checkpoint, a folder of tables, or the name of a preset.
        corpus: Text to train on: a file or folder, pocket:NAME, hf:NAME, or a folder of tokens.
        out: File for the counts, which plan train takes.
        tokenizer: Folder of the tokenizer; by default the model's own, or that of the folder of tokens.
        tokens_per_gpu: Numbers of tokens that a rank reads in a step.
        sequence: Tokens of a sequence; longer documents are cut.
        sample: The most tokens to read.
        cache: Folder of fetched corpora.
    """
    from engrammar.cells import as_text
    from engrammar.planning.distinct import count_distinct
    from engrammar.planning.plan import Addresses, find_tokenizer
    from engrammar.planning.touches import read_sample

    chosen = find_tokenizer(model, corpus, tokenizer)
    addresses = Addresses.of_model(model, chosen)
    read = read_sample(corpus, chosen, num_tokens=sample, prompt_tokens=sequence, cache=cache)
    counted = count_distinct(addresses, read, tokens=tokens_per_gpu, sequence=sequence, names=(model, corpus))
    if out is not None:
        counted.write(out)
    lines = [[f"{tokens:,}", f"{share:.1%}"] for tokens, share in zip(counted.tokens, counted.shares)]
    print(as_text(["tokens", "distinct rows"], lines))


def train(
    model: Positional[str],
    /,
    gpus: tuple[int, ...] = (8,),
    tokens_per_gpu: int = 16_384,
    rows: Path | None = None,
    machine: Path | None = None,
    memory: Literal["adam", "row_adam", "sinkhorn"] = "row_adam",
    matrices: Literal["muon", "adamw"] = "muon",
    table_dtype: Literal["fp32", "bf16"] = "fp32",
    json_output: Json = False,
) -> None:
    """Estimate what training costs before machines are rented: memory, bytes sent, what the exchange of rows hides.

    Args:
        model: The name of a preset, or a folder with a config.json.
        gpus: Numbers of GPUs.
        tokens_per_gpu: Tokens that a GPU reads in a step.
        rows: The share of distinct rows, which plan rows counted; by default what was counted for the paper's presets.
        machine: JSON with speeds to replace, by the names of engrammar.planning.training.Cluster.
        memory: The row optimizer.
        matrices: The optimizer of the backbone's matrices.
        table_dtype: The dtype of the tables.
    """
    from engrammar.model.configuration import load_config
    from engrammar.model.presets import preset
    from engrammar.planning.distinct import DistinctRows, measured_for
    from engrammar.planning.speeds import read_figures
    from engrammar.planning.training import WHERE, Cluster, Job, make_training_plan
    from engrammar.planning.training_report import describe_training

    cluster = read_figures(Cluster, machine) if machine else Cluster()
    config = load_config(Path(model)) if Path(model).is_dir() else preset(model)
    if config.memory_config is None:
        raise ValueError(f"{model} has no memory: plan a model that has one.")
    counted = DistinctRows.read(rows) if rows else measured_for(model)
    plans = []
    for number in gpus:
        job = Job(
            config=config,
            gpus=number,
            tokens=tokens_per_gpu,
            share=counted.share(tokens_per_gpu),
            memory=memory,
            matrices=matrices,
            table_bytes=4 if table_dtype == "fp32" else 2,
        )
        plans += [make_training_plan(job, cluster, where) for where in WHERE]
    print(json.dumps(plans, indent=1) if json_output else describe_training(plans, counted, tokens_per_gpu))


COMMANDS = by_name(rows, train)
