"""From token ids to row numbers (paper section 2.2). Depends on token ids alone.

Everything is in exact int64 arithmetic, and NumPy and torch give the same integers. Negative ids are masked: they are
never looked back to and break look-back, so "missing history", "row start", and "left padding" are one thing, -1.
Letters: B batch, T tokens, S positions of history (N-1), N highest order, K heads per order, H = (N-1)*K columns.
"""

from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engrammar.config import Geometry, MemoryConfig

INT64_MAX = np.iinfo(np.int64).max
LAYER_STRIDE = 10_007  # seed = base seed + LAYER_STRIDE * layer
MASK64 = (1 << 64) - 1
GOLDEN64 = 0x9E3779B97F4A7C15  # splitmix64's increment


def derive_geometry(config: MemoryConfig, *, num_classes: int, fill_class: int) -> Geometry:
    """Multipliers and table sizes of every memory layer. Call once per model and save the result.

    Args:
        num_classes: classes of the compressed vocabulary; it bounds the multipliers, so it is part of the hash.
        fill_class: class of `config.fill_id`.
    """
    if not 0 <= fill_class < num_classes:
        raise ValueError(f"fill_class is {fill_class}; allowed: 0 to num_classes-1 = {num_classes - 1}.")
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


def _is_prime(n: int) -> bool:
    """Deterministic Miller-Rabin, exact below 3.3e24."""
    small = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n in small or n < 2 or any(n % p == 0 for p in small):
        return n in small
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(
        (x := pow(base, odd, n)) in (1, n - 1) or any((x := x * x % n) == n - 1 for _ in range(twos - 1))
        for base in small
    )


def table_sizes(config: MemoryConfig) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Every (layer, order, head) takes the next prime not used anywhere in the model, from rows_per_head - 1 on."""
    used: set[int] = set()
    last = [rows - 1 for rows in config.rows_per_head]

    def next_prime(order_index: int) -> int:
        candidate = last[order_index] + 1
        while candidate in used or not _is_prime(candidate):
            candidate += 1
        used.add(candidate)
        last[order_index] = candidate
        return candidate

    return tuple(
        tuple(tuple(next_prime(order) for _ in range(config.num_heads)) for order in range(len(config.orders)))
        for _ in config.layers
    )


def hash_ngrams_reference(
    ids_T: list[int], *, config: MemoryConfig, geometry: Geometry, layer_index: int
) -> list[list[int]]:
    """The definition, one token at a time in Python integers: the plain twin of `hash_ngrams`.

    `ids_T` are classes of one sequence (raw end and dead ids are judged on them too, so use it without compression or
    with ids whose classes are themselves). Returns rows_TH, head-local.
    """
    stops = set(config.dead_ids)
    rows_TH = []
    for t, current in enumerate(ids_T):
        looked_back = [geometry.fill_class] * config.max_ngram_size
        alive = current >= 0 and current not in stops
        looked_back[0] = current if alive else geometry.fill_class
        for k in range(1, config.max_ngram_size):
            previous = ids_T[t - k] if t >= k else -1
            alive = alive and previous >= 0 and previous not in stops and previous not in config.end_ids
            looked_back[k] = previous if alive else geometry.fill_class
        row_H = []
        for order, sizes_K in zip(config.orders, geometry.table_sizes[layer_index]):
            mix = 0
            for k in range(order):
                mix ^= looked_back[k] * geometry.multipliers[layer_index][k]
            row_H += [mix % size for size in sizes_K]
        rows_TH.append(row_H)
    return rows_TH


def look_back(
    ids_BT: Tensor,
    *,
    config: MemoryConfig,
    geometry: Geometry,
    history_BS: Tensor | None = None,
    classes_V: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> list[Tensor]:
    """The class each token sees 0, 1, ..., N-1 positions back; `geometry.fill_class` where there is none.

    Args:
        ids_BT: raw token ids, int64; negative ones are masked.
        history_BS: the N-1 raw ids before `ids_BT`, -1 where there are none; None is the start of a row.
        classes_V: class of each raw id; None hashes raw ids.
        starts_BT: True where a packed document begins; look-back never crosses it. (Who carries a history across such
            a start puts -1 before it.)

    Returns:
        N tensors [B, T] of int64 classes.

    Raises:
        ValueError: the history is not N-1 ids long; on the CPU also: an id is not below the vocabulary size, or the
            class map was never set.
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
    checked = raw.device.type == "cpu" and raw.numel() > 0 and not torch.compiler.is_compiling()
    if checked and int(raw.max()) >= num_ids:
        raise ValueError(f"Token id {int(raw.max())} is outside the vocabulary of {num_ids} ids: use its tokenizer.")
    if classes_V is None:
        return raw
    classes = classes_V.index_select(0, raw.clamp_min(0).flatten()).view_as(raw)
    if checked and int(classes.min()) < 0:
        raise ValueError("The model's class map was never set: load a checkpoint, or call memory.set_classes.")
    return classes


def hash_ngrams(looked_back: list[Tensor], *, config: MemoryConfig, geometry: Geometry, layer_index: int) -> Tensor:
    """Head-local row numbers (spec: mix_n = XOR of class_k * multiplier_k over k < n; row = mix_n mod prime).

    Args:
        looked_back: N tensors [B, T] from `look_back`.

    Returns:
        rows_BTH, int64; columns ordered by order, then head.
    """
    multipliers_N = geometry.multipliers[layer_index]
    columns = []
    mix_BT = looked_back[0] * multipliers_N[0]
    for order, sizes_K in zip(config.orders, geometry.table_sizes[layer_index]):
        mix_BT = mix_BT ^ (looked_back[order - 1] * multipliers_N[order - 1])
        columns += [torch.remainder(mix_BT, size) for size in sizes_K]
    return torch.stack(columns, dim=-1)


def hash_ngrams_numpy(
    looked_back: list[NDArray[np.int64]], *, config: MemoryConfig, geometry: Geometry, layer_index: int
) -> NDArray[np.int64]:
    """`hash_ngrams` for arrays, bit for bit, at several times the speed.

    NumPy divides unsigned integers by a constant in vector registers, and takes a remainder one by one. The result
    [B, T, H] lies in memory head by head, as tables are read; `np.ascontiguousarray` gives it token by token.
    """
    multipliers_N = [np.uint64(multiplier) for multiplier in geometry.multipliers[layer_index]]
    seen_NBT = [seen_BT.view(np.uint64) for seen_BT in looked_back]  # classes, and so the mix, are never negative
    rows_HBT = np.empty((config.num_columns, *looked_back[0].shape), dtype=np.uint64)
    mix_BT = seen_NBT[0] * multipliers_N[0]
    scratch_BT = np.empty_like(mix_BT)
    heads = iter(rows_HBT)
    for order, sizes_K in zip(config.orders, geometry.table_sizes[layer_index]):
        np.multiply(seen_NBT[order - 1], multipliers_N[order - 1], out=scratch_BT)
        mix_BT ^= scratch_BT
        for size in map(np.uint64, sizes_K):
            np.floor_divide(mix_BT, size, out=scratch_BT)
            scratch_BT *= size
            np.subtract(mix_BT, scratch_BT, out=next(heads))
    return np.moveaxis(rows_HBT.view(np.int64), 0, -1)


def head_offsets(geometry: Geometry, layer_index: int) -> tuple[int, ...]:
    """Where each head's table begins in its layer's one parameter, heads end to end."""
    return (0, *accumulate(geometry.head_sizes(layer_index)[:-1]))
