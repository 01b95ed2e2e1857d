"""What a server has done, in Prometheus' text format."""

from collections.abc import Iterator

from torch import nn

from engrammar.memory import Memory
from engrammar.serve.openai.engine import Engine
from engrammar.stores.serving import StoredTables


def sources_of(model: nn.Module) -> list[StoredTables]:
    """Where the rows of a model's memories are read, its own and attached ones; parameters are not counted."""
    found = [module.source for module in model.modules() if isinstance(module, Memory)]
    return [source for source in found if isinstance(source, StoredTables)]


def render(engine: Engine) -> str:
    """All counters, and gauges of what is there now: what each means, its kind, and a line for each of its labels."""
    lines: list[str] = []
    for name, meaning, samples in _counted(engine):
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP engrammar_{name} {meaning}", f"# TYPE engrammar_{name} {kind}"]
        lines += [f"engrammar_{name}{labels} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _counted(engine: Engine) -> Iterator[tuple[str, str, list[tuple[str, int]]]]:
    counts, sources = engine.counts, sources_of(engine.model)
    ends = [(f'{{outcome="{end}"}}', counts[end]) for end in ("finished", "cancelled", "failed", "refused")]
    yield "answers_total", "Answers by how they ended.", ends
    tokens = [('{kind="prompt"}', counts["prompt_tokens"]), ('{kind="new"}', counts["new_tokens"])]
    yield "tokens_total", "Tokens of prompts and of answers.", tokens
    rows, missing = (sum(getattr(one.counts, kind) for one in sources) for kind in ("rows", "missing_rows"))
    yield "rows_read_total", "Rows of memory tables that were asked for.", [("", rows)]
    yield "rows_missing_total", "Rows that could not be read.", [("", missing)]
    caches = [(f'{{table="{name}"}}', one) for source in sources for name, one in source.caches().items()]
    yield "cache_hits_total", "Rows that were in the cache of a table.", [(name, one.hits) for name, one in caches]
    misses = [(name, one.misses) for name, one in caches]
    yield "cache_misses_total", "Rows that were not in the cache of a table.", misses
    yield "patch_changes_total", "Patches that were applied or undone.", [("", counts["changes"])]
    yield "starts_total", "Starts of the model.", [("", counts["starts"])]
    yield "requests_running", "Requests that are under way.", [("", engine.running)]
    yield "answers_held", "Answers that are under way or waiting.", [("", engine.held)]
    yield "patches", "Patches that are applied.", [("", len(engine.patches()))]
    yield "patches_on_request", "Patches that requests may choose.", [("", len(engine.offered()))]
