"""What addressing costs: tokens/s from raw ids to the rows of every memory layer, compared with the authors' way.

Letters: B batch, T tokens, V ids, H columns.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engrammar.addressing import derive_geometry, hash_ngrams, hash_ngrams_numpy, look_back
from engrammar.cells import Column
from engrammar.config import DIALECTS
from engrammar_lab.bench.figures import line_by_line, named
from engrammar_lab.bench.turns import measured_in_turn, rates_of, seconds_of, settle_allocator

BATCH, LENGTH = 8, 2048
NUM_IDS, NUM_CLASSES, FILL_CLASS = 128_815, 98_627, 2  # the sizes of DeepSeek-V3's class map
CONFIG = DIALECTS["demo"]
GEOMETRY = derive_geometry(CONFIG, num_classes=NUM_CLASSES, fill_class=FILL_CLASS)
LAYERS = range(len(CONFIG.layers))
DEMO, NUMPY, TORCH = "demo-style NumPy", "ours, NumPy", "ours, torch"
NUMPY_BY_TOKEN = "ours, NumPy, copied token by token"  # the memory layout of demo-style
FILL, COPY = "fill the output", "copy the output"

Rows = list[NDArray[np.int64]]
COLUMNS = (
    Column("", "name"),
    Column("million tokens/s", "tokens_per_second", ".1f", 1e6),
    Column("best", "best_tokens_per_second", ".1f", 1e6),
    Column("ms", "milliseconds", ".3f"),
    Column("share of limit", "share_of_limit", ".0%"),
)
table = line_by_line(COLUMNS, lambda result: named(result["rates"]))


def _demo_style(ids_BT: NDArray[np.int64], classes_V: NDArray[np.int64]) -> Rows:
    """The baseline: per layer, shift by padding, XOR the products, `%` once per head, stack."""
    class_BT = classes_V[ids_BT]
    rows = []
    for multipliers_N, sizes in zip(GEOMETRY.multipliers, GEOMETRY.table_sizes):
        shifted = [
            np.pad(class_BT, ((0, 0), (back, 0)), constant_values=FILL_CLASS)[:, :LENGTH]
            for back in range(CONFIG.max_ngram_size)
        ]
        columns = []
        for order, sizes_K in zip(CONFIG.orders, sizes):
            mix_BT = shifted[0] * multipliers_N[0]
            for back in range(1, order):
                mix_BT = np.bitwise_xor(mix_BT, shifted[back] * multipliers_N[back])
            columns += [mix_BT % size for size in sizes_K]
        rows.append(np.stack(columns, axis=2))
    return rows


def _contenders() -> tuple[dict[str, Callable[[], Rows]], dict[str, Callable[[], object]]]:
    """The ways to hash, and ways merely to write as many bytes, which are the machine's limit."""
    rng = np.random.default_rng(0)
    ids_BT, classes_V = rng.integers(0, NUM_IDS, (BATCH, LENGTH)), rng.integers(0, NUM_CLASSES, NUM_IDS)
    ids, classes = torch.from_numpy(ids_BT), torch.from_numpy(classes_V)
    chosen: dict[str, Any] = {"config": CONFIG, "geometry": GEOMETRY}

    def ours_numpy() -> Rows:
        seen = [seen_BT.numpy() for seen_BT in look_back(ids, classes_V=classes, **chosen)]
        return [hash_ngrams_numpy(seen, layer_index=index, **chosen) for index in LAYERS]

    def ours_by_token() -> Rows:
        return [np.ascontiguousarray(rows_BTH) for rows_BTH in ours_numpy()]

    def ours_torch() -> Rows:
        seen = look_back(ids, classes_V=classes, **chosen)
        return [hash_ngrams(seen, layer_index=index, **chosen).numpy() for index in LAYERS]

    output = np.empty((len(LAYERS), BATCH, LENGTH, CONFIG.num_columns), dtype=np.int64)
    source = np.ones_like(output)
    limits: dict[str, Callable[[], object]] = {FILL: lambda: output.fill(1), COPY: lambda: np.copyto(output, source)}
    contenders: dict[str, Callable[[], Rows]] = {
        DEMO: lambda: _demo_style(ids_BT, classes_V),
        NUMPY: ours_numpy,
        NUMPY_BY_TOKEN: ours_by_token,
        TORCH: ours_torch,
    }
    return contenders, limits


def bench_hash(quick: bool) -> dict[str, Any]:
    """Times the ways to hash in turn, on one thread, so that all see the same machine.

    Returns:
        tokens/s (median and best of the repeats) over both layers, class lookup included; `speedup` is ours in NumPy
        over demo-style by the medians; `share_of_limit` is the time to write the output array over the time taken.
        Our output is laid out head by head; `speedup_by_token` includes a copy into demo-style's order.
    """
    repeats = 30 if quick else 300
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(repeats)
    finally:
        torch.set_num_threads(threads)


def _measure(repeats: int) -> dict[str, Any]:
    contenders, limits = _contenders()
    # Demo-style counts rows in each head's own table, ours over the layer's one table.
    expected = [rows_BTH + GEOMETRY.head_offsets(index) for index, rows_BTH in enumerate(contenders[DEMO]())]
    for name in set(contenders) - {DEMO}:
        equal = all(np.array_equal(rows_BTH, other) for rows_BTH, other in zip(contenders[name](), expected))
        assert equal, f"{name} differs from {DEMO}"
    settle_allocator()
    runs: dict[str, Callable[[], object]] = {**contenders, **limits}
    times = measured_in_turn(lambda _turn, _place, name: seconds_of(runs[name]), runs, repeats, warm_up=3)
    rates = rates_of(times, BATCH * LENGTH, "tokens")
    for name, rate in rates.items():
        rate["share_of_limit"] = median(times[FILL]) / median(times[name])
    return {
        "shapes": f"one thread, {BATCH} x {LENGTH} tokens, {len(LAYERS)} layers x {CONFIG.num_columns} heads, "
        f"{repeats} runs each",
        "rates": rates,
        "speedup": rates[NUMPY]["tokens_per_second"] / rates[DEMO]["tokens_per_second"],
        "speedup_by_token": rates[NUMPY_BY_TOKEN]["tokens_per_second"] / rates[DEMO]["tokens_per_second"],
        "speedup_torch": rates[TORCH]["tokens_per_second"] / rates[DEMO]["tokens_per_second"],
    }


def verdict(result: dict[str, Any]) -> str:
    """The speed-ups, and the cost of the path that the model takes."""
    return (
        f"Ours in NumPy is {result['speedup']:.1f} times demo-style ({result['speedup_by_token']:.1f} with the rows "
        f"then copied token by token); in torch {result['speedup_torch']:.1f}. Training and the model take the torch "
        f"path, which costs {1e6 / result['rates'][TORCH]['tokens_per_second']:.1f} ms a thousand tokens; the NumPy "
        "path is for reading ahead of them."
    )
