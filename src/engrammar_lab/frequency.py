"""Where memory opens and helps, by how often an n-gram occurs in the training text.

N-grams are those that the model reads: classes of ids, looked back to within a block and its boundary, missing history
included. Letters: B batch, T tokens, N highest order, F tokens of a whole text.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engrammar.addressing import GOLDEN64, look_back
from engrammar.memory import Memory
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.off import memory_off
from engrammar.train.data import TokenSet
from engrammar_lab.depth import validation_batches
from engrammar_lab.gates import recorded_gates

CHUNK_TOKENS = 2**20  # tokens whose history is looked up at once


def ngram_keys(looked_back: list[NDArray[np.int64]]) -> NDArray[np.uint64]:
    """A 64-bit number for the n-gram of each token, n = len(looked_back).

    Each step is one to one in the class it adds, so n-grams that differ in one token never get the same number; other
    pairs do with a chance of 2^-64.

    Args:
        looked_back: the class of the token itself, of the one before, ... (`addressing.look_back`).
    """
    key = np.zeros(looked_back[0].shape, np.uint64)
    for seen in looked_back:
        key = (key ^ seen.astype(np.uint64)) * np.uint64(GOLDEN64)
        key ^= key >> np.uint64(29)
    return key


def text_keys(memory: Memory, tokens: TokenSet, *, length: int, order: int) -> NDArray[np.uint64]:
    """key_F of the n-gram that ends at each token of the training text, which is cut into blocks as in training."""
    num_tokens = len(tokens.blocks("train", length)) * length
    step = max(1, CHUNK_TOKENS // length) * length
    parts = []
    for first in range(0, num_tokens, step):
        ids = tokens.read("train", first, min(first + step, num_tokens))
        seen = classes_seen(memory, torch.from_numpy(ids).view(-1, length))
        parts.append(ngram_keys(seen[:order]).ravel())
    return np.concatenate(parts)


def classes_seen(memory: Memory, ids_BT: Tensor) -> list[NDArray[np.int64]]:
    """The class of each token, of the one before, ... up to the highest order, [B, T] each."""
    classes_V = None if memory.class_of_id is None else memory.class_of_id.cpu()
    seen = look_back(ids_BT, config=memory.config, geometry=memory.geometry, classes_V=classes_V)
    return [seen_BT.numpy() for seen_BT in seen]


def occurrences(sorted_keys: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """How often each of `keys` is among `sorted_keys`."""
    return np.searchsorted(sorted_keys, keys, "right") - np.searchsorted(sorted_keys, keys, "left")


def frequency_bins(counts: NDArray[np.int64], columns: dict[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """Means of values in bins of their counts, bounded by powers of two: 0, 1, 2-3, 4-7, 8-15, ...

    Returns:
        per bin that is not empty: `count_from`, `count_to`, `tokens`, and the mean of each column.
    """
    _, bit_length = np.frexp(counts.astype(np.float64))  # 0 for 0, else floor(log2(count)) + 1
    return [
        {
            "count_from": 0 if bits == 0 else 2 ** (bits - 1),
            "count_to": 2**bits - 1,
            "tokens": int((bit_length == bits).sum()),
            **{name: float(values[bit_length == bits].mean()) for name, values in columns.items()},
        }
        for bits in sorted(set(bit_length.tolist()))
    ]


def gate_by_frequency(
    model: EngrammarForCausalLM,
    tokens: TokenSet,
    *,
    length: int,
    plain: EngrammarForCausalLM | None = None,
    batch_size: int = 32,
    num_tokens: int | None = None,
) -> dict[str, Any]:
    """Gates of validation tokens, and the loss on the token after each, by how often its n-gram is in training text.

    N-grams are counted in the whole training text; a run that trains on a share of it has seen about that share.

    Args:
        length: tokens of a block, as the model was trained.
        plain: a model without memory to compare with.

    Returns:
        the number of `tokens` scored and, under `orders`, per order from 2 to N the bins of `frequency_bins`: `gate`
        (0..1, mean over branches and memory layers), `loss_on`, `loss_off` (memory switched off) and `loss_plain`, in
        nats.

    Raises:
        ValueError: the model has no memory, or `plain` has another vocabulary.
    """
    memory = model.model.memory
    if memory is None:
        raise ValueError("gate_by_frequency was given a model without memory; allowed: models with `config.memory`.")
    if plain is not None and plain.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"plain has {plain.config.vocab_size} ids and the model {model.config.vocab_size}; allowed: one tokenizer."
        )
    orders = memory.config.orders
    found: dict[str, list[Any]] = {}
    keys: dict[int, list[Any]] = {order: [] for order in orders}
    for ids_BT, real_BT in validation_batches(tokens, length=length, batch_size=batch_size, num_tokens=num_tokens):
        scored_BT = real_BT[:, 1:]  # tokens that another one follows
        for name, values_BT in _losses_and_gates(model.eval(), plain, ids_BT).items():
            found.setdefault(name, []).append(values_BT[scored_BT].double().numpy())
        seen = classes_seen(memory, ids_BT)
        for order in orders:
            keys[order].append(ngram_keys(seen[:order])[:, :-1][scored_BT.numpy()])
    columns = {name: np.concatenate(parts) for name, parts in found.items()}
    bins = {}
    for order in orders:
        known = text_keys(memory, tokens, length=length, order=order)
        known.sort()
        bins[str(order)] = frequency_bins(occurrences(known, np.concatenate(keys[order])), columns)
    return {"tokens": len(columns["gate"]), "orders": bins}


@torch.no_grad()
def _losses_and_gates(
    model: EngrammarForCausalLM, plain: EngrammarForCausalLM | None, ids_BT: Tensor
) -> dict[str, Tensor]:
    """For each token except a row's last: its gate, and each model's loss on the next token, in nats; all [B, T-1]."""
    with recorded_gates(model) as gates:
        found = {"loss_on": _loss(model, ids_BT)}
    found["gate"] = torch.stack(list(gates.values())).mean(0)[:, :-1].cpu()
    with memory_off(model):
        found["loss_off"] = _loss(model, ids_BT)
    if plain is not None:
        found["loss_plain"] = _loss(plain.eval(), ids_BT)
    return found


def _loss(model: EngrammarForCausalLM, ids_BT: Tensor) -> Tensor:
    logits_BTV = model(ids_BT.to(model.device), use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:].to(model.device), reduction="none").cpu()
