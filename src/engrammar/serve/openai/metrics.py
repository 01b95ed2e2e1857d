"""What a server has done, in Prometheus' text format."""

from collections.abc import Iterator
from dataclasses import asdict

from torch import nn

from engrammar.memory import Memory
from engrammar.serve.openai.engine import Engine
from engrammar.stores.serving import StoredTables

HELP = {
    "answers": "Answers by how they ended.",
    "tokens": "Tokens of prompts and of answers.",
    "rows_read": "Rows of memory tables that were asked for.",
    "rows_missing": "Rows that could not be read.",
    "cache_hits": "Rows that were in the cache of a table.",
    "cache_misses": "Rows that were not in the cache of a table.",
    "patch_changes": "Patches that were applied or undone.",
    "starts": "Starts of the model.",
    "requests_running": "Requests that are under way.",
    "answers_held": "Answers that are under way or waiting.",
    "patches": "Patches that are applied.",
    "patches_on_request": "Patches that requests may choose.",
}
GAUGES = ("requests_running", "answers_held", "patches", "patches_on_request")


def sources_of(model: nn.Module) -> list[StoredTables]:
    """Where the rows of a model's memories are read, its own and attached ones; parameters are not counted."""
    found = [module.source for module in model.modules() if isinstance(module, Memory)]
    return [source for source in found if isinstance(source, StoredTables)]


def render(engine: Engine) -> str:
    """All counters, one line each."""
    lines: list[str] = []
    for name, samples in _counted(engine):
        kind = "gauge" if name in GAUGES else "counter"
        full = f"engrammar_{name}" + ("" if name in GAUGES else "_total")
        lines += [f"# HELP {full} {HELP[name]}", f"# TYPE {full} {kind}"]
        lines += [f"{full}{labels} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _counted(engine: Engine) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    counts = asdict(engine.counts)
    yield (
        "answers",
        [(f'{{outcome="{end}"}}', counts[end]) for end in ("finished", "cancelled", "failed", "refused")],
    )
    yield "tokens", [(f'{{kind="{kind}"}}', counts[f"{kind}_tokens"]) for kind in ("prompt", "new")]
    sources = sources_of(engine.model)
    yield "rows_read", [("", sum(source.counts.rows for source in sources))]
    yield "rows_missing", [("", sum(source.counts.missing_rows for source in sources))]
    caches = [(f'{{table="{name}"}}', one) for source in sources for name, one in source.caches().items()]
    yield "cache_hits", [(labels, cache.hits) for labels, cache in caches]
    yield "cache_misses", [(labels, cache.misses) for labels, cache in caches]
    yield "patch_changes", [("", counts["changes"])]
    yield "starts", [("", counts["starts"])]
    yield "requests_running", [("", engine.running)]
    yield "answers_held", [("", engine.held)]
    yield "patches", [("", len(engine.patches()))]
    yield "patches_on_request", [("", len(engine.offered()))]
