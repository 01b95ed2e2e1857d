"""`engrammar lab ...`: studies of what memory buys. Imports are inside the functions, as in `main.py`."""

import sys
from pathlib import Path

from tyro.conf import Positional

from engrammar_cli.extras import by_name, require


def _where(scale: str, out: Path | None, results: Path | None) -> dict[str, Path]:
    return {"runs": out or Path("runs") / scale, "results": results or Path("results") / scale}


def run(
    study: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    scale: str = "lab",
    seeds: int = 3,
    jobs: int = 2,
    out: Path | None = None,
    results: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Run a study, or continue one that was killed; results are written after each run.

    Args:
        study: allocation, rates, horizon, scaling, rivals, pair, ablation, branches, placement, optimizer,
            dialects, boundary or gate.
        overrides: Settings for all of its points, as section.setting=value (trainer.max_steps=20 for a rehearsal).
        scale: The recipe that the points start from: lab (two cores) or lab-100m (one GPU; jobs 1).
        seeds: Runs of each point.
        jobs: Runs at the same time, one thread each.
        out: Folder for the runs [runs/SCALE].
        results: Folder for the study's JSON [results/SCALE].
        dry_run: Train nothing; prepare the text, then count and print every point's parameters and FLOPs.
    """
    require("lab")
    from engrammar.cells import as_text, cells, titles
    from engrammar_lab.studies import PLANNED, plan, run_study

    if not dry_run:
        run_study(study, **_where(scale, out, results), seeds=seeds, jobs=jobs, scale=scale, overrides=overrides)
        return
    planned = plan(study, scale=scale, overrides=overrides)
    print(f"{study}, {scale}", as_text(titles(PLANNED), [cells(PLANNED, point) for point in planned]), sep="\n\n")
    print(f"{len(planned) * seeds} runs, {sum(each['training_flops'] for each in planned) * seeds:.2e} FLOPs in all.")


def rerun(
    study: Positional[str],
    point: Positional[str],
    /,
    seed: int = 0,
    out: Path = Path("runs/rerun"),
    results: Path = Path("results/lab"),
) -> None:
    """Train one point of a committed study again and compare: a stranger's check. Exit code 1 where it does not agree.

    Args:
        study: A study with results.
        point: One of its points, as the report names it ("80%").
        seed: Which of its runs.
        out: Folder for the run; delete it to train again.
        results: Folder with the studies' JSON.
    """
    require("lab")
    from engrammar_lab.studies import rerun as again

    found = again(study, point, seed, out=out, results=results)
    print(f"{study}, {point}, seed {seed}: {found.words()}")
    sys.exit(0 if found.agrees else 1)


def measure(
    overrides: Positional[tuple[str, ...]] = (),
    /,
    study: str = "pair",
    scale: str = "lab",
    seeds: int = 3,
    jobs: int = 2,
    out: Path | None = None,
    results: Path | None = None,
) -> None:
    """Measure the models of a study's pair beside their loss: tasks, depth, gates over text, row traffic.

    Args:
        overrides: The settings that the study was run with.
        study: pair, or horizon (its longest runs; tasks alone).
        scale: The scale that the study was run at.
        seeds: Runs of each point, as in the study.
        jobs: Seeds at the same time, one thread each.
        out: Folder with the runs [runs/SCALE].
        results: Folder for the JSON [results/SCALE].
    """
    require("lab")
    from engrammar_lab.measure import run_measures

    run_measures(study, **_where(scale, out, results), seeds=seeds, jobs=jobs, scale=scale, overrides=overrides)


def attach(
    seeds: int = 3,
    jobs: int = 2,
    base: Path | None = None,
    results: Path = Path("results/lab"),
    cache: Path = Path("data/pocket"),
) -> None:
    """Teach SmolLM2-135M two small domains by a memory, by LoRA and by full tuning, and ask what it knows.

    Args:
        seeds: Lessons of each domain.
        jobs: Lessons at the same time, one thread each.
        base: The folder of another causal language model of transformers.
        results: Folder for the study's JSON.
        cache: Where fetched texts, questions and the model are kept.
    """
    require("lab")
    from engrammar_lab.adapters.study import run_attach

    run_attach(seeds=seeds, jobs=jobs, base=base, results=results, cache=cache)


def forgetting(
    seeds: int = 3,
    jobs: int = 2,
    base: Path | None = None,
    results: Path = Path("results/lab"),
    cache: Path = Path("data/pocket"),
) -> None:
    """Teach SmolLM2-135M a thousand glosses equally well in several ways, and ask what it has forgotten.

    Args:
        seeds: Choices of the glosses.
        jobs: Models at the same time, one thread each.
        base: The folder of another causal language model of transformers.
        results: Folder for the study's JSON.
        cache: Where fetched texts, questions and the model are kept.
    """
    require("lab")
    from engrammar_lab.adapters.forgetting import run_forgetting

    run_forgetting(seeds=seeds, jobs=jobs, base=base, results=results, cache=cache)


def edit(
    facts: Positional[tuple[Path, ...]],
    seeds: int = 3,
    jobs: int = 2,
    edits: tuple[int, ...] = (1, 10, 100, 1000),
    ways: tuple[str, ...] = (),
    base: Path | None = None,
    results: Path = Path("results/lab"),
    cache: Path = Path("data/pocket"),
) -> None:
    """Change facts of SmolLM2-135M by patches and by other ways, and ask what it says then.

    Args:
        facts: Files of CounterFact or zsRE as EasyEdit writes them; none is part of engrammar.
        seeds: Orders of the facts.
        jobs: Runs at the same time, one thread each.
        edits: Numbers of facts that are changed.
        ways: Some of the ways; none given means all.
        base: The folder of another causal language model of transformers.
        results: Folder for the study's JSON.
        cache: Where fetched texts and the model are kept.
    """
    require("lab")
    from engrammar_lab.editing.study import WAYS, run_edits

    chosen = ways or tuple(WAYS)
    run_edits(facts, edits=edits, seeds=seeds, jobs=jobs, ways=chosen, base=base, results=results, cache=cache)


def report(results: Path = Path("results/lab"), check: bool = False) -> None:
    """Make the report from the results, or check that it follows from them.

    Args:
        results: Folder with the studies' JSON.
        check: Change nothing; exit with 2 if the report is not what the JSON says.
    """
    require("lab")
    from engrammar_lab.report import write_report

    write_report(results, check=check)


def advice(results: Path = Path("results/lab"), out: Path = Path("src/engrammar/planning/advice.json")) -> None:
    """Write what `engrammar info --advise` knows, from the results of the study horizon.

    Args:
        results: Folder with horizon.json.
        out: The file of the package.
    """
    require("lab")
    import json

    from engrammar.tables.sealed import write_text
    from engrammar_lab.report.horizon import advice as known

    path = results / "horizon.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: engrammar lab run horizon.")
    write_text(out, json.dumps(known(json.loads(path.read_text())), indent=1) + "\n")


COMMANDS = by_name(run, rerun, measure, attach, edit, forgetting, advice, report)
