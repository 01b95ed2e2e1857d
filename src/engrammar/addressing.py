"""From token ids to row numbers (paper section 2.2). Depends on token ids alone.

All arithmetic is exact int64, and NumPy and torch give the same integers. A negative id is masked: look-back never
returns it and never crosses it. So missing history, the start of a row and left padding are the same thing, -1.
Letters: B batch, T tokens, S positions of history (N-1), V ids, N highest order, K heads per order, H = (N-1)*K
columns.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engrammar.config import Geometry, MemoryConfig, check_setting

INT64_MAX = np.iinfo(np.int64).max
LAYER_STRIDE = 10_007  # seed = base seed + LAYER_STRIDE * layer
MASK64 = (1 << 64) - 1
GOLDEN64 = 0x9E3779B97F4A7C15  # splitmix64's increment


def derive_geometry(config: MemoryConfig, *, num_classes: int, fill_class: int) -> Geometry:
    """Derives the multipliers and table sizes of every memory layer (section 2.2). Call it once per model.

    Args:
        num_classes: the number of classes of the compressed vocabulary. It bounds the multipliers, so it is part of
            the hash.
        fill_class: the class of `config.fill_id`.

    Returns:
        The geometry, to be saved with the model.

    Raises:
        ValueError: `fill_class` is not one of the classes.
    """
    check_setting("fill_class", fill_class, 0 <= fill_class < num_classes, f"0 to num_classes-1 = {num_classes - 1}")
    half = max(1, (INT64_MAX // num_classes) // 2)  # keeps id * multiplier inside int64: the mix is never negative
    multipliers = tuple(
        _numpy_multipliers(config, layer, half)
        if config.multipliers == "numpy"
        else _splitmix_multipliers(config, index, half)
        for index, layer in enumerate(config.layers)
    )
    return Geometry(
        num_classes=num_classes,
        fill_class=fill_class,
        multipliers=multipliers,
        table_sizes=table_sizes(config),
        rows_multiple=config.rows_multiple,
    )


def _numpy_multipliers(config: MemoryConfig, layer: int, half: int) -> tuple[int, ...]:
    draws = np.random.default_rng(config.seed + LAYER_STRIDE * layer).integers(0, half, size=config.max_ngram_size)
    return tuple(2 * int(draw) + 1 for draw in draws)


def _splitmix_multipliers(config: MemoryConfig, index: int, half: int) -> tuple[int, ...]:
    seed = config.seed + LAYER_STRIDE * index
    return tuple(
        2 * (_splitmix64((seed + GOLDEN64 * (position + 1)) & MASK64) % half) + 1
        for position in range(config.max_ngram_size)
    )


def _splitmix64(state: int) -> int:
    z = (state + GOLDEN64) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def table_sizes(config: MemoryConfig) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Gives each (layer, order, head) in turn the smallest prime from `rows_per_head` on that is not used yet."""
    from sympy import isprime  # slow to import, and loading a model does not need it; torch depends on it

    used: set[int] = set()
    last = [rows - 1 for rows in config.rows_per_head]

    def next_prime(order_index: int) -> int:
        candidate = last[order_index] + 1
        while candidate in used or not isprime(candidate):
            candidate += 1
        used.add(candidate)
        last[order_index] = candidate
        return candidate

    return tuple(
        tuple(tuple(next_prime(order) for _ in range(config.num_heads)) for order in range(len(config.orders)))
        for _ in config.layers
    )


def look_back(
    ids_BT: Tensor,
    *,
    config: MemoryConfig,
    geometry: Geometry,
    history_BS: Tensor | None = None,
    classes_V: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> list[Tensor]:
    """The class that each token sees 0, 1, ..., N-1 positions back, or `geometry.fill_class` where there is none.

    Args:
        ids_BT: raw token ids, int64. Negative ids are masked.
        history_BS: the N-1 raw ids before `ids_BT`, -1 where there are none. None: the rows begin here.
        classes_V: the class of each raw id. None hashes raw ids.
        starts_BT: True where a packed document begins; look-back never crosses it.

    Returns:
        N tensors [B, T] of int64 classes.

    Raises:
        ValueError: the history is not N-1 ids long, or an id is outside the vocabulary (checked on the CPU only).
    """
    num_back = config.max_ngram_size - 1
    num_tokens = ids_BT.shape[1]
    if history_BS is None:
        history_BS = ids_BT.new_full((ids_BT.shape[0], num_back), -1)
    elif history_BS.shape[1] != num_back:
        raise ValueError(f"The history holds {history_BS.shape[1]} ids; give the {num_back} before these, -1 for none.")
    raw = torch.cat([history_BS, ids_BT], dim=1).long()  # narrower integers would overflow in the products
    dead = raw < 0
    for token_id in config.dead_ids:
        dead = dead | (raw == token_id)
    classes = _classes_of(raw, classes_V, geometry)

    def seen(tensor: Tensor, k: int) -> Tensor:
        return tensor[:, num_back - k : num_back - k + num_tokens]

    blocked = dead.clone()
    for token_id in config.end_ids:
        blocked = blocked | (raw == token_id)
    alive = ~seen(dead, 0)
    looked_back = [torch.where(alive, seen(classes, 0), geometry.fill_class)]
    if starts_BT is not None:
        starts_BT = torch.nn.functional.pad(starts_BT, (num_back, 0), value=False)
    for k in range(1, num_back + 1):
        alive = alive & ~seen(blocked, k)
        if starts_BT is not None:
            alive = alive & ~seen(starts_BT, k - 1)
        looked_back.append(torch.where(alive, seen(classes, k), geometry.fill_class))
    return looked_back


def _classes_of(raw: Tensor, classes_V: Tensor | None, geometry: Geometry) -> Tensor:
    num_ids = geometry.num_classes if classes_V is None else classes_V.shape[0]
    if raw.device.type == "cpu" and not torch.compiler.is_compiling() and raw.numel() and int(raw.max()) >= num_ids:
        raise ValueError(f"Token id {int(raw.max())} is outside the vocabulary of {num_ids} ids: use its tokenizer.")
    if classes_V is None:
        return raw
    return classes_V.index_select(0, raw.clamp_min(0).flatten()).view_as(raw)


def hash_ngrams(looked_back: list[Tensor], *, config: MemoryConfig, geometry: Geometry, layer_index: int) -> Tensor:
    """Hashes n-grams to rows (section 2.2): mix_n = XOR of class_k * multiplier_k over k < n; row = mix_n mod prime.

    Args:
        looked_back: N tensors [B, T] from `look_back`.

    Returns:
        rows_BTH, int64: row numbers over the layer's whole table, in which the heads follow each other. Columns are
        sorted by order, then by head.
    """
    multipliers_N = geometry.multipliers[layer_index]
    sizes, offsets = iter(geometry.head_sizes(layer_index)), iter(geometry.head_offsets(layer_index))
    columns = []
    mix_BT = looked_back[0] * multipliers_N[0]
    for order in config.orders:
        mix_BT = mix_BT ^ (looked_back[order - 1] * multipliers_N[order - 1])
        columns += [torch.remainder(mix_BT, next(sizes)).add_(next(offsets)) for _ in range(config.num_heads)]
    return torch.stack(columns, dim=-1)


def hash_ngrams_numpy(
    looked_back: list[NDArray[np.int64]], *, config: MemoryConfig, geometry: Geometry, layer_index: int
) -> NDArray[np.int64]:
    """`hash_ngrams` for arrays: the same integers, several times faster.

    NumPy divides unsigned integers by a constant in vector registers but takes remainders one by one, so the remainder
    is computed from the quotient. The result [B, T, H] is contiguous head by head, the order in which tables are read;
    `np.ascontiguousarray` makes it contiguous token by token.
    """
    multipliers_N = [np.uint64(multiplier) for multiplier in geometry.multipliers[layer_index]]
    seen_NBT = [seen_BT.view(np.uint64) for seen_BT in looked_back]  # classes, and so the mix, are never negative
    rows_HBT = np.empty((config.num_columns, *looked_back[0].shape), dtype=np.uint64)
    sizes, offsets = (map(np.uint64, values(layer_index)) for values in (geometry.head_sizes, geometry.head_offsets))
    mix_BT = seen_NBT[0] * multipliers_N[0]
    scratch_BT = np.empty_like(mix_BT)
    heads = iter(rows_HBT)
    for order in config.orders:
        np.multiply(seen_NBT[order - 1], multipliers_N[order - 1], out=scratch_BT)
        mix_BT ^= scratch_BT
        for _ in range(config.num_heads):
            size, rows_BT = next(sizes), next(heads)
            np.floor_divide(mix_BT, size, out=scratch_BT)
            scratch_BT *= size
            np.subtract(mix_BT, scratch_BT, out=rows_BT)
            rows_BT += next(offsets)
    return np.moveaxis(rows_HBT.view(np.int64), 0, -1)
