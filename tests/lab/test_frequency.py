"""Gates by n-gram frequency: counts are those of a plain loop, losses those of the model."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engrammar.off import memory_off
from engrammar_lab import frequency
from engrammar_lab.frequency import frequency_bins, gate_by_frequency, ngram_keys, occurrences, text_keys
from engrammar_lab.gates import recorded_gates
from models import END, VOCABULARY, tiny_model
from token_sets import token_set

LENGTH = 9


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    generator = np.random.default_rng(0)
    chances = np.array([8, 4, 2, 1, 1, 0.1]) / 16.1
    train, validation = (generator.choice([END, 3, 4, 5, 47, 9], size, p=chances) for size in (400, 60))
    return token_set(tmp_path_factory.mktemp("tokens"), vocab_size=VOCABULARY, train=train, validation=validation)


def ngrams(dialect, ids, order):
    """The n-gram at each token of one block, by the rules of `paper` (start of row) or `qwen_next` (end of text)."""
    found = []
    for place in range(len(ids)):
        seen = [int(ids[place])]
        for back in range(1, order):
            previous = int(ids[place - back]) if place >= back else None
            ended = seen[-1] is None or previous is None or (dialect == "qwen_next" and previous == END)
            seen.append(None if ended else previous)
        classed = {"paper": lambda i: END if i is None else i % 41, "qwen_next": lambda i: END if i is None else i}
        found.append(tuple(map(classed[dialect], seen)))
    return found


def train_counts(dialect, tokens, order):
    ids = tokens.read("train", 0, 400 // LENGTH * LENGTH).reshape(-1, LENGTH)
    return Counter(itertools.chain.from_iterable(ngrams(dialect, row, order) for row in ids))


def test_keys_are_equal_where_ngrams_are():
    grams = np.array(list(itertools.product(range(7), repeat=3)))
    keys = ngram_keys(list(grams.T))
    assert len(set(keys.tolist())) == len(grams)
    assert np.array_equal(ngram_keys(list(grams[::-1].T)), keys[::-1])


def test_keys_of_a_large_vocabulary_do_not_meet():
    grams = np.unique(np.random.default_rng(1).integers(0, 99_092, (200_000, 4)), axis=0)
    assert len(np.unique(ngram_keys(list(grams.T)))) == len(grams)


def test_occurrences_are_counted():
    known = np.array([2, 2, 2, 5, 9], np.uint64)
    assert occurrences(known, np.array([5, 2, 3, 9, 10], np.uint64)).tolist() == [1, 3, 0, 1, 0]


def test_planted_gates_fall_into_bins_of_planted_counts():
    counts = np.array([0, 1, 2, 3, 4, 7, 0, 64])
    gates = np.array([0.25, 0.1, 0.2, 0.4, 0.5, 0.7, 0.75, 0.9])
    bins = [tuple(entry.values()) for entry in frequency_bins(counts, {"gate": gates})]
    expected = [(0, 0, 2, 0.5), (1, 1, 1, 0.1), (2, 3, 2, 0.3), (4, 7, 2, 0.6), (64, 127, 1, 0.9)]
    assert bins == [pytest.approx(entry) for entry in expected]


@pytest.mark.parametrize("dialect", ["paper", "qwen_next"])
@pytest.mark.parametrize("order", [2, 3])
def test_training_ngrams_are_counted_as_the_model_reads_them(tokens, dialect, order, monkeypatch):
    memory = tiny_model(dialect).model.memory
    keys = text_keys(memory, tokens, length=LENGTH, order=order)
    counts = train_counts(dialect, tokens, order)
    assert sorted(np.unique(keys, return_counts=True)[1].tolist()) == sorted(counts.values())
    monkeypatch.setattr(frequency, "CHUNK_TOKENS", 2 * LENGTH + 1)
    assert np.array_equal(text_keys(memory, tokens, length=LENGTH, order=order), keys)


@pytest.mark.parametrize("dialect", ["paper", "qwen_next"])
def test_bins_hold_the_gates_and_losses_of_their_tokens(tokens, dialect):
    model, plain = tiny_model(dialect), tiny_model(None, seed=1)
    found = gate_by_frequency(model, tokens, length=LENGTH, plain=plain, batch_size=3)
    assert json.loads(json.dumps(found)) == found
    assert found["tokens"] == 59
    blocks = tokens.blocks("validation", LENGTH)
    for order in (2, 3):
        counts, rows = train_counts(dialect, tokens, order), []
        for block in blocks:
            ids = block["input_ids"][None]
            with torch.no_grad(), recorded_gates(model) as gates:
                logits = [model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits]
            with torch.no_grad(), memory_off(model):
                logits.append(model(ids, use_cache=False).logits)
            assert sorted(gates) == [1, 3]
            grams = ngrams(dialect, block["input_ids"].tolist(), order)
            for place in range(int(block["attention_mask"].sum()) - 1):
                losses = [float(F.cross_entropy(each[0, place], ids[0, place + 1])) for each in logits]
                rows.append([counts[grams[place]], *losses, float(gates[1][0, place] + gates[3][0, place]) / 2])
        rows = np.array(rows)
        bins = found["orders"][str(order)]
        assert len(bins) > 3
        for entry in bins:
            here = rows[(rows[:, 0] >= entry["count_from"]) & (rows[:, 0] <= entry["count_to"])]
            assert entry["tokens"] == len(here)
            means = [entry[name] for name in ("loss_on", "loss_plain", "loss_off", "gate")]
            assert means == pytest.approx(here[:, 1:].mean(0).tolist(), rel=1e-4)
        assert sum(entry["tokens"] for entry in bins) == 59


def test_models_that_cannot_be_compared_are_refused(tokens):
    with pytest.raises(ValueError, match="without memory"):
        gate_by_frequency(tiny_model(None), tokens, length=LENGTH)
    with pytest.raises(ValueError, match="60 ids and the model 53"):
        gate_by_frequency(tiny_model("paper"), tokens, length=LENGTH, plain=tiny_model(None, vocab_size=60))
