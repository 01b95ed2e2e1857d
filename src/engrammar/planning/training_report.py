"""Describes the plans of `training.py` in words."""

from collections.abc import Sequence
from typing import Any

from engrammar.cells import Column, as_text, cells, in_lines, titles
from engrammar.planning.distinct import DistinctRows

GB, MB, MS = 1e9, 1e6, 1e-3
SUMMARY = (
    Column("GPUs", "gpus"),
    Column("tables on", "where"),
    Column("GB on a GPU", "gpu_total", ".1f", GB),
    Column("GB in RAM", "ram_total", ".1f", GB),
    Column("GB in a file", "file_total", ".1f", GB),
    Column("MB row numbers", "sent_bytes.row numbers", ".1f", MB),
    Column("MB rows", "sent_bytes.rows", ".1f", MB),
    Column("MB row gradients", "sent_bytes.row gradients", ".1f", MB),
    Column("GB weights", "sent_bytes.weights", ".1f", GB),
    Column("GB gradients", "sent_bytes.gradients", ".1f", GB),
    Column("ms computing", "seconds.computing", ".0f", MS),
    Column("ms weights' traffic", "seconds.weights and gradients", ".0f", MS),
    Column("ms waiting for rows", "waits_total", ".1f", MS),
    Column("of the step", "share_of_step", ".1%"),
)
HIDES = {
    "device": dict.fromkeys(("bring rows", "return gradients", "update rows"), "nothing: in order with the model"),
    "ram": {
        "bring rows": "the blocks before the first memory",
        "return gradients": "nothing: the optimizer waits",
        "update rows": "the next step's blocks before the first memory",
    },
}
HIDES["file"] = HIDES["ram"]
UNCOUNTED = (
    "Not counted: the CUDA context, buffers of NCCL, fragments of the allocator, attention over long sequences. Speeds "
    "and the share of the GPU's peak are assumptions (--machine replaces them); no step of this table was run on a GPU."
)


def describe_training(plans: Sequence[dict[str, Any]], rows: DistinctRows, tokens: int) -> str:
    """All plans in one table; if they are of one number of GPUs, also their parts."""
    share = (
        f"{rows.share(tokens):.1%} of the rows that a rank's {tokens:,} tokens look up are distinct, as counted in "
        f"{rows.corpus} with {rows.model}, in sequences of {rows.sequence:,} tokens. Bytes and times are those of a "
        "rank and a step."
    )
    summary = [cells(SUMMARY, {**plan, "waits_total": sum(plan["waits"].values())}) for plan in plans]
    parts = [in_lines(share), as_text(titles(SUMMARY), summary, num_keys=2)]
    if len({plan["gpus"] for plan in plans}) == 1:
        parts += [_memory(plans), _hiding(plans)]
    too_large = [f"{plan['gpus']} GPUs, {plan['where']}" for plan in plans if not plan["fits"]]
    if too_large:
        parts.append(in_lines(f"More than a GPU holds: {'; '.join(too_large)}."))
    return "\n\n".join([*parts, in_lines(UNCOUNTED)])


def _memory(plans: Sequence[dict[str, Any]]) -> str:
    kinds = list(dict.fromkeys(kind for plan in plans for kind in plan["gpu_bytes"]))
    lines = [
        [kind, *(f"{held / GB:.2f}" if (held := plan["gpu_bytes"].get(kind)) else "" for plan in plans)]
        for kind in kinds
    ]
    return as_text(["GB on a GPU", *(f"tables: {plan['where']}" for plan in plans)], lines)


def _hiding(plans: Sequence[dict[str, Any]]) -> str:
    lines = [
        [plan["where"], kind, f"{plan['seconds'][kind] / MS:.2f}", f"{waited / MS:.2f}", HIDES[plan["where"]][kind]]
        for plan in plans
        for kind, waited in plan["waits"].items()
    ]
    return as_text(["tables on", "what", "ms", "ms waited", "hides behind"], lines, num_keys=2)
