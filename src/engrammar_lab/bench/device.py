"""All that needs an accelerator, in one run: the checks of `tests/device`, and decoding with rows off the device.

usage: python -m engrammar_lab.bench.device (`make gpu`). Without an accelerator it says so and writes nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import torch

from engrammar.tables.sealed import write_text
from engrammar_lab.bench import decode
from engrammar_lab.bench.turns import seconds_of, wait_for
from engrammar_lab.machine import accelerator, describe_run

COPIED = 2**28  # bytes of a copy that measures what a device can be given
TESTS = ("tests/device",)  # as pytest names them
# 8 GiB of rows, under ten minutes.
FULL = decode.Plan(
    preset="100m", rows_per_head=4_200_000, batches=(1, 16, 64), rounds=5, steps=24, corpus="pocket:wiki"
)
table = decode.table


def check(device: str, tests: Sequence[str]) -> dict[str, Any]:
    """Runs tests in a process of their own, which is told the device by ENGRAMMAR_DEVICE.

    Returns:
        the number that `passed`, and the names of those that `failed` or were `skipped`.

    Raises:
        ChildProcessError: the process ended before it had a report.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        ended = subprocess.run(command, env={**os.environ, "ENGRAMMAR_DEVICE": device}, check=False)
        if not report.exists():
            raise ChildProcessError(
                f"The tests ended with status {ended.returncode} and left no report: run {command}."
            )
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if {"failure", "error"} & {part.tag for part in case}]
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    return {"passed": len(cases) - len(failed) - len(skipped), "failed": failed, "skipped": skipped}


def measure_copies(device: torch.device) -> dict[str, float]:
    """GB a second from the host to the device, from pinned memory and from any."""

    def copy(x: torch.Tensor) -> None:
        x.to(device, copy=True)
        wait_for(device)

    plain = torch.ones(COPIED, dtype=torch.uint8)
    sources = {"any": plain} if device.type == "cpu" else {"pinned": plain.pin_memory(), "any": plain}
    return {name: COPIED / median(seconds_of(copy, x) for _ in range(9)) / 1e9 for name, x in sources.items()}


def bench_device(decoding: decode.Plan, tests: Sequence[str] = TESTS) -> dict[str, Any]:
    """The result that `make gpu` writes; the device is that of `decoding`."""
    return {
        **describe_run("make gpu"),
        "quick": False,
        "checks": check(decoding.device, tests),
        "gb_per_second": measure_copies(torch.device(decoding.device)),
        **decode.bench_decode(False, decoding),
    }


def verdict(result: dict[str, Any]) -> str:
    """What was checked, what copies can reach at most, and decoding's own verdict."""
    checks = result["checks"]
    failed = f"{len(checks['failed'])} failed ({', '.join(checks['failed'])})" if checks["failed"] else "none failed"
    limits = ", ".join(f"{rate:.1f} from {name} memory" for name, rate in result["gb_per_second"].items())
    return (
        f"Of the tests on the device {checks['passed']} passed, {failed} and {len(checks['skipped'])} were skipped. "
        f"GB a second from the host: {limits}. {decode.verdict(result)}"
    )


def main(out: Path = Path("results/bench/device.json")) -> None:
    """Checks and measures what needs an accelerator.

    Args:
        out: The JSON to write.
    """
    device = accelerator()
    if device.type == "cpu":
        sys.exit("torch finds no accelerator here, so nothing was run: start this on a machine that has one.")
    result = bench_device(replace(FULL, device=device.type))
    write_text(out, json.dumps(result, indent=1) + "\n")
    print(verdict(result))
    sys.exit(1 if result["checks"]["failed"] else 0)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
