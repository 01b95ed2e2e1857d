"""What a memory's tables will cost where they are served: hit rates, bytes, tokens/s by tier, the smallest cache.

It needs a sample of the text to be served and a description of the machine (docs/planning-tables.md).
Letters: S rows of each table that a cache holds, V ids; T, H and D as in `touches`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from engrammar.config import Encoding, Geometry, MemoryConfig, row_bytes
from engrammar.model.configuration import load_config
from engrammar.model.presets import PRESETS, preset
from engrammar.planning import touches
from engrammar.planning.speeds import TIERS, Costs, Speeds
from engrammar.planning.touches import Sample, is_prepared
from engrammar.tables.folder import open_tables
from engrammar.tables.headers import read_json
from engrammar.tables.released.files import Settings
from engrammar.tables.released.qwen import describe_memory
from engrammar.train.data import TokenSet
from engrammar.vocabulary import compress_vocabulary, fingerprint, load_tokenizer

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # parts of a table's rows that a cache holds
FEWEST = 8  # rows of a cache


def find_tokenizer(model: str, corpus: str, tokenizer: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder `tokenizer` if given, else the model's own, else that of a corpus of tokens.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    folders = [Path(model), TokenSet.open(Path(corpus)).tokenizer_path if is_prepared(corpus) else Path(corpus)]
    own = [folder for folder in folders if (folder / "tokenizer.json").exists()]
    if tokenizer is None and not own:
        raise ValueError(f"{model} comes without a tokenizer: give one with --tokenizer.")
    return load_tokenizer(tokenizer or own[0])


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """What turns ids into rows."""

    memory: MemoryConfig
    geometry: Geometry
    classes_V: NDArray[np.int64] | None  # the class of each raw id; None if raw ids are hashed

    @classmethod
    def of_model(cls, model: str, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The addresses of a checkpoint, a folder of tables, a preset built for `tokenizer`, or a released model.

        Of a released Qwen4-Exp model, config.json is enough.

        Raises:
            ValueError: there is no such model, it has no memory, or it belongs to another tokenizer.
        """
        classes_V, folder = compress_vocabulary(tokenizer), Path(model)
        if not (folder / "config.json").exists() and (folder / "memory.json").exists():
            tables = open_tables(folder)
            memory, geometry, sha256 = tables.memory, tables.geometry, tables.tokenizer_sha256
        else:
            if model in PRESETS:
                config = preset(model, tokenizer=tokenizer, classes_V=classes_V)
            elif (released := _released_settings(folder)) is not None:
                quantized = (released.values.get("quantization_config") or {}).get("quant_method") == "fp8"
                memory, geometry = describe_memory(released, "fp8" if quantized else "bf16")
                return cls(memory=memory, geometry=geometry, classes_V=None)
            elif folder.is_dir():
                config = load_config(folder)
            else:
                raise ValueError(f"There is no model {model!r}: give a folder of one, or {', '.join(PRESETS)}.")
            if config.memory_config is None:
                raise ValueError(f"{model} has no memory: name a model that has one.")
            memory, geometry, sha256 = config.memory_config, config.memory_geometry, config.tokenizer_sha256
        if sha256 is not None and sha256 != fingerprint(tokenizer):
            raise ValueError(f"The tokenizer ({len(tokenizer)} tokens) is not the one that {model} was built with.")
        return cls(memory=memory, geometry=geometry, classes_V=None if memory.compression == "none" else classes_V)


def _released_settings(folder: Path) -> Settings | None:
    """The settings of a released Qwen4-Exp model; None if the folder holds none."""
    path = folder / "config.json"
    settings = Settings(path, read_json(path) if path.is_file() else {})
    return settings if "ple_layer_ids" in settings.values else None


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a sample does to the tables."""

    # At index S, the hit rate of S pinned rows, chosen by the first half or in hindsight.
    pinned_S: NDArray[np.float64]
    afterwards_S: NDArray[np.float64]
    # Some cache sizes, and the dynamic cache's hit rate at each, in the first memory layer.
    sizes: list[int]
    dynamic: list[float]
    # For each encoding, the pages of a token in one layer; see `pages_per_token`.
    pages: dict[Encoding, tuple[float, float]]
    facts: dict[str, Any]  # the sample in numbers
    hot: dict[int, NDArray[np.int64]]  # for each layer, `hot_rows` of the whole sample


def study(addresses: Addresses, sample: Sample) -> Study:
    """Looks up the sample's rows and counts them, one layer at a time."""
    memory, geometry = addresses.memory, addresses.geometry
    num_rows = [geometry.num_stored_rows(index) for index in range(len(memory.layers))]
    sizes = sorted({max(FEWEST, round(max(num_rows) * share)) for share in SHARES})
    pinned, afterwards, seen, repeated = [], [], [], []
    hot, pages, dynamic = {}, {}, list[float]()
    for index, layer in enumerate(tqdm(memory.layers, desc="counting rows", unit="layer", delay=2, leave=False)):
        rows_TH = touches.touched_rows(sample, memory, geometry, addresses.classes_V, index)
        known, asked = np.split(rows_TH, [len(rows_TH) // 2])
        hot[layer] = touches.hot_rows(rows_TH)
        pinned.append(touches.pinned_hits(known, asked) / asked.size)
        afterwards.append(touches.pinned_hits(asked, asked) / asked.size)
        seen.append(touches.seen_share(known, asked))
        repeated.append(touches.repeated_share(rows_TH, sample, num_rows[index]))
        if index == 0:  # layers differ in their rows, but not in how often rows repeat or spread over pages
            dynamic = [touches.cached_share(rows_TH, num_rows[0], size) for size in sizes]
            for encoding in get_args(Encoding):
                size = row_bytes(encoding, memory.head_dim)
                pages[encoding] = touches.pages_per_token(rows_TH, sample, size)
    facts = {
        "tokens": len(sample.ids_T),
        "prompts": int(sample.prompt_T[-1]) + 1,
        "rows": num_rows,
        "rows_touched": [len(rows_D) for rows_D in hot.values()],
        "repeated_in_prompt": float(np.mean(repeated)),
        "seen_before": float(np.mean(seen)),
    }
    return Study(
        pinned_S=_mean(pinned),
        afterwards_S=_mean(afterwards),
        sizes=sizes,
        dynamic=dynamic,
        pages=pages,
        facts=facts,
        hot=hot,
    )


def _mean(curves: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The mean over layers, each with a cache of S rows. A curve that ends early keeps its last value."""
    longest = max(map(len, curves))
    return np.mean([np.pad(curve_S, (0, longest - len(curve_S)), mode="edge") for curve_S in curves], axis=0)


def make_plan(
    memory: MemoryConfig,
    studied: Study,
    speeds: Speeds,
    *,
    wanted_hit_rate: float | None = None,
    wanted_tokens_per_s: float | None = None,
) -> dict[str, Any]:
    """The plan as JSON: the `sample`, `caches` and `tiers` by cache size, `encodings`, and what was `wanted`."""
    pages_per_row = studied.pages[memory.row_encoding][0] / memory.num_columns
    costs = Costs(memory=memory, speeds=speeds, pages_per_row=pages_per_row)
    caches = [
        {
            "cache_rows": size,
            "share_of_rows": size / max(studied.facts["rows"]),
            "pinned": float(studied.pinned_S[min(size, len(studied.pinned_S) - 1)]),
            "dynamic": dynamic,
            "pinned_afterwards": float(studied.afterwards_S[min(size, len(studied.afterwards_S) - 1)]),
        }
        for size, dynamic in zip(studied.sizes, studied.dynamic)
    ]
    tiers = []
    for cache in caches:
        hit_rate = max(cache["pinned"], cache["dynamic"])
        expected = {tier: costs.tokens_per_s(tier, hit_rate) for tier in TIERS}
        tiers.append({"cache_rows": cache["cache_rows"], "hit_rate": hit_rate} | expected)
    wanted = [] if wanted_hit_rate is None else [(f"hit rate {wanted_hit_rate:.3g}", wanted_hit_rate)]
    if wanted_tokens_per_s is not None:
        for tier in TIERS:
            if (needed := costs.hit_rate_for(tier, wanted_tokens_per_s)) is not None:
                wanted.append((f"{wanted_tokens_per_s:,.0f} tokens/s, {tier}", needed))
    return {
        "sample": studied.facts,
        "caches": caches,
        "encodings": _describe_encodings(memory, studied.pages),
        "speeds": asdict(speeds),
        "tiers": tiers,
        "wanted": [
            {"wish": wish, "hit_rate": needed, "cache_rows": smallest_cache(studied.pinned_S, needed)}
            for wish, needed in wanted
        ],
    }


def _describe_encodings(memory: MemoryConfig, pages: dict[Encoding, tuple[float, float]]) -> dict[str, Any]:
    per_token = len(memory.layers) * memory.num_columns
    return {
        encoding: {
            "row_bytes": row_bytes(encoding, memory.head_dim),
            "bytes_per_token": per_token * row_bytes(encoding, memory.head_dim),
            "pages_per_token": len(memory.layers) * alone,
            "pages_per_token_of_a_prompt": len(memory.layers) * together,
        }
        for encoding, (alone, together) in pages.items()
    }


def smallest_cache(curve_S: NDArray[np.float64], hit_rate: float) -> int | None:
    """Rows of the smallest pinned set with this hit rate; None if all rows of the first half do not reach it."""
    size = int(np.searchsorted(curve_S, hit_rate - 1e-12))
    return size if size < len(curve_S) else None
