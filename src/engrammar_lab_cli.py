"""`engrammar lab ...`: studies of what memory buys. As in `engrammar_cli`, commands import inside."""

from collections.abc import Sequence
from pathlib import Path

import tyro
from tyro.conf import Positional

from engrammar_answer import answer

app = tyro.extras.SubcommandApp()


@app.command
def run(
    study: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    seeds: int = 3,
    jobs: int = 2,
    out: Path = Path("runs/lab"),
    results: Path = Path("results/lab"),
) -> None:
    """Run a study, or go on with one that was killed; results are written after each run.

    Args:
        study: allocation, scaling or ablation.
        overrides: Settings for all of its points, as section.setting=value (trainer.max_steps=20 for a rehearsal).
        seeds: Runs of each point.
        jobs: Runs at the same time, one thread each.
        out: Folder for the runs.
        results: Folder for the study's JSON.
    """
    from engrammar.lab.studies import run_study

    run_study(study, runs=out, seeds=seeds, jobs=jobs, results=results, overrides=overrides)


@app.command
def report(results: Path = Path("results/lab"), check: bool = False) -> None:
    """Make the report from the results, or check that it follows from them.

    Args:
        results: Folder with the studies' JSON.
        check: Change nothing; exit 2 where the report is not what the JSON says.
    """
    from engrammar.lab.studies_report import write_report

    write_report(results, check=check)


def main(args: Sequence[str] | None = None) -> None:
    """`engrammar lab ARGS`."""
    answer(app, "engrammar lab", "Studies of what memory buys.", args)


if __name__ == "__main__":
    main()
