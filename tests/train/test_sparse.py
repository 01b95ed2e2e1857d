"""Only chosen rows take a step: all others keep their bits, and a text that reads none of them says what it did."""

import math
from collections import Counter

import pytest
import torch

from attached_models import VOCABULARY, attached_model, base_model, memory_config, tokenizer
from engrammar.attach import attach
from engrammar.attach.attaching import require_attachment
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.placement import place_tables
from engrammar.train.sparse import SparseRows, share_changed

ROWS = 5
NUMBERS = {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-8}


def texts(seed: int, low: int, high: int, num: int = 6) -> torch.Tensor:
    return torch.randint(low, high, (num, 12), generator=torch.Generator().manual_seed(seed))


BACKGROUND, TAUGHT = texts(0, 2, 30), texts(1, 20, VOCABULARY)


def fresh_model():
    """A model with a memory whose rows are all zero, as `attach` makes it."""
    torch.manual_seed(0)
    return attach(base_model("llama"), memory_config(rows_per_head=(997, 1009)), tokenizer())


def memory_of(model):
    return require_attachment(model, None).memories()["default"].memory


def plain_choice(memory, ids_BT: torch.Tensor, layer: int) -> set[int]:
    """The twin, in loops."""
    reads = Counter(int(row) for row in memory.addresses(ids_BT)[layer].flatten())
    blocks = [set(memory.addresses(ids_T[None])[layer].flatten().tolist()) for ids_T in BACKGROUND]
    score = {
        row: count / sum(reads.values()) * math.log((len(blocks) + 1) / (sum(row in own for own in blocks) + 1))
        for row, count in reads.items()
    }
    best = sorted(score, key=lambda row: (-score[row], row))[:ROWS]
    return {row for row in best if score[row] > 1e-12}


@pytest.mark.parametrize("memory", ["row_adam", "adam", "sinkhorn"])
@pytest.mark.parametrize("where", ["model", "ram"])
def test_only_chosen_rows_change(where, memory):
    model = attached_model("llama")
    held = memory_of(model)
    placement = None if where == "model" else place_tables(model, where="ram")
    optimizer = build_optimizer(model, OptimizerSettings(memory=memory, max_grad_norm=1.0), **NUMBERS)
    optimizer.sparse = SparseRows(model.train(), [BACKGROUND[:4], BACKGROUND[4:]], ROWS)

    def tables() -> dict[int, torch.Tensor]:
        if placement is None:
            return {layer: held.table(layer).weight.detach().clone() for layer in held.config.layers}
        placement.flush()
        return {layer: placement.tables[held.table(layer).name].detach().clone() for layer in held.config.layers}

    for step in range(3):
        before, own = tables(), TAUGHT[2 * step : 2 * step + 2]
        expected = {layer: plain_choice(held, own, layer) for layer in before}
        for half in own.split(1):  # gradients of two passes are accumulated
            model(half, labels=half, use_cache=False).loss.backward()
        chosen = {layer: set(optimizer.sparse.chosen(layer).tolist()) for layer in before}
        optimizer.step()
        optimizer.zero_grad()
        for layer, after in tables().items():
            changed = set((after != before[layer]).any(1).nonzero()[:, 0].tolist())
            assert chosen[layer] == expected[layer] and len(expected[layer]) == ROWS
            assert changed <= expected[layer] and (changed or memory == "sinkhorn")
    assert optimizer.sparse.counted == {}


def test_a_text_that_reads_no_chosen_row_is_left_alone_to_the_bit():
    """The control trains every row that is read, and changes it."""
    logits, shares = {}, {}
    for kind in ("sparse", "all"):
        model = fresh_model()
        before = model.eval()(BACKGROUND, use_cache=False).logits
        optimizer = build_optimizer(model, OptimizerSettings(max_grad_norm=1.0), **NUMBERS)
        if kind == "sparse":
            optimizer.sparse = SparseRows(model, [BACKGROUND], 40)
        losses = []
        for _ in range(20):
            loss = model.train()(TAUGHT, labels=TAUGHT, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[-1] < losses[0]
        logits[kind] = model.eval()(BACKGROUND, use_cache=False).logits
        shares[kind] = share_changed(memory_of(model), [BACKGROUND])
        memory = memory_of(model)
        zero = [
            (memory.table(layer).weight[rows] == 0).all(-1).all(-1)
            for layer, rows in memory.addresses(BACKGROUND).items()
        ]
        untouched_BT = torch.stack(zero).all(0).cummin(1).values  # nothing that was changed stands before them either
        assert untouched_BT.any() and torch.equal(logits[kind][untouched_BT], before[untouched_BT])
    assert shares["sparse"] < shares["all"]


def test_rows_that_every_background_block_reads_are_never_trained():
    model = fresh_model()
    sparse = SparseRows(model.train(), [TAUGHT[:1]], 1000)  # the one block is what is taught
    model(TAUGHT[:1], labels=TAUGHT[:1], use_cache=False).loss.backward()
    assert all(not len(sparse.chosen(layer)) for layer in memory_of(model).config.layers)
    sparse.keep(None)
    assert all(not len(memory_of(model).table(layer).weight.grad.values()) for layer in memory_of(model).config.layers)
    sparse.remove()
    sparse.end_step()
    model(TAUGHT[:1], labels=TAUGHT[:1], use_cache=False).loss.backward()
    assert sparse.counted == {}


def test_rows_that_the_background_reads_too_often_are_left_alone():
    """With none allowed, what the model says of the background stays the same to the bit; with all, it does not."""
    logits = {}
    for most_common in (0.0, 1.0):
        model = fresh_model()
        before = model.eval()(BACKGROUND, use_cache=False).logits
        optimizer = build_optimizer(model, OptimizerSettings(memory="row_adam", max_grad_norm=1.0), **NUMBERS)
        optimizer.sparse = SparseRows(model, [BACKGROUND], None, most_common=most_common)
        for _ in range(5):
            model.train()(TAUGHT, labels=TAUGHT, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        logits[most_common] = model.eval()(BACKGROUND, use_cache=False).logits
        optimizer.sparse.remove()
    assert torch.equal(logits[0.0], before) and not torch.equal(logits[1.0], before)


def test_evaluation_is_not_counted():
    model = fresh_model()
    sparse = SparseRows(model, [BACKGROUND], ROWS)
    model.eval()(TAUGHT, use_cache=False)
    with torch.no_grad():
        model.train()(TAUGHT, use_cache=False)
    assert sparse.counted == {}


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"num_rows": 0}, "num_rows is 0; allowed: 1 or more"),
        ({"background": []}, "There is no background text"),
        ({"most_common": 1.5}, "most_common is 1.5; allowed: 0 to 1"),
        ({"model": base_model("llama")}, "This model has 0 memories"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_sentence(given, wrong):
    with pytest.raises(ValueError, match=wrong):
        SparseRows(**{"model": fresh_model(), "background": [BACKGROUND], "num_rows": ROWS, **given})
