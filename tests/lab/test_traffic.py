"""Collisions, row traffic and Zipf fits: planted tables, closed forms, and the model's own addresses."""

import json

import numpy as np
import pytest
import torch

from engrammar.config import DIALECTS
from engrammar_lab.traffic import collisions, distinct, memory_traffic, row_traffic, zipf_exponent
from models import END, VOCABULARY, tiny_model
from token_sets import token_set

LENGTH = 11


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    ids = np.random.default_rng(0).choice([END, *range(3, 50)], 700)
    return token_set(tmp_path_factory.mktemp("tokens"), vocab_size=VOCABULARY, train=ids, validation=ids)


def test_distinct_keys_are_found_where_they_first_come():
    place_D, count_D = distinct(np.array([7, 3, 7, 9, 3, 7], np.uint64))
    assert (place_D.tolist(), count_D.tolist()) == ([1, 0, 3], [2, 3, 1])


def test_collisions_of_a_planted_table():
    rows_DK = np.array([[0, 1], [0, 1], [1, 1], [2, 4], [3, 0]])
    found = collisions(rows_DK, np.array([1, 2, 3, 4, 10]), (7, 5))
    in_seven, in_five = 1 - (6 / 7) ** 4, 1 - (4 / 5) ** 4
    assert found == pytest.approx(
        {
            "distinct": 5,
            "ngrams_per_row": 5 / 6,
            "in_a_head": (2 / 5 + 3 / 5) / 2,
            "in_a_head_expected": (in_seven + in_five) / 2,
            "in_all_heads": 2 / 5,
            "in_all_heads_expected": in_seven * in_five,
            "same_rows": 2 / 5,
            "same_rows_expected": 1 - (34 / 35) ** 4,
            "tokens_in_a_head": (3 / 20 + 6 / 20) / 2,
            "tokens_in_all_heads": 3 / 20,
            "own_lookups": (0.25 * 1 + 0.5 * 2 + 0.75 * 3 + 4 + 10) / 20,
        }
    )


def test_neighbours_that_differ_by_head_are_not_the_same_rows():
    found = collisions(np.array([[0, 1], [0, 2], [3, 1]]), np.ones(3, np.int64), (5, 7))
    assert found["in_all_heads"] == pytest.approx(1 / 3)
    assert found["same_rows"] == 0


def test_a_random_hash_collides_as_expected():
    sizes_K = (1009, 211)
    rows_DK = np.random.default_rng(1).integers(0, sizes_K, (800, 2))
    found = collisions(rows_DK, np.ones(800, np.int64), sizes_K)
    for share in ("in_a_head", "in_all_heads", "same_rows"):
        assert found[share] == pytest.approx(found[f"{share}_expected"], abs=0.03)
    assert 0.5 < found["in_all_heads_expected"] < 0.6


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.4])
def test_the_exponent_of_exact_zipf_counts_is_found(exponent):
    counts = np.random.default_rng(2).permutation((1e12 * np.arange(1, 3000.0) ** -exponent).astype(np.int64))
    assert zipf_exponent(counts, 10, 2000) == pytest.approx(exponent, rel=1e-3)
    scaled = np.concatenate([counts, np.zeros(50, np.int64)])
    assert zipf_exponent(scaled, 10, 2000) == pytest.approx(exponent, rel=1e-3)


def test_ranks_outside_the_counts_are_refused():
    for first, last in ((0, 3), (2, 2), (1, 4)):
        with pytest.raises(ValueError, match="allowed: two or more in 1 to 3"):
            zipf_exponent(np.array([5, 0, 2, 1]), first, last)


def test_traffic_of_planted_counts():
    count_R = np.array([0] * 50 + [1] * 130 + [10] * 18 + [300, 90])
    total = 130 + 180 + 390
    assert row_traffic(np.random.default_rng(3).permutation(count_R)) == {
        "rows": 200,
        "untouched": 0.25,
        "hottest_1_percent": pytest.approx(390 / total),
        "hottest_10_percent": pytest.approx((390 + 180) / total),
        "zipf": None,
    }
    zipf = row_traffic((1e9 / np.arange(1, 5001)).astype(np.int64))["zipf"]
    assert zipf["ranks"] == [10, 500]
    assert zipf["exponent"] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_traffic_is_that_of_the_models_addresses(tokens, dialect):
    memory = tiny_model(dialect).model.memory
    found = memory_traffic(memory, tokens, length=LENGTH)
    assert json.loads(json.dumps(found)) == found
    ids_BT = torch.from_numpy(tokens.read("train", 0, 700 // LENGTH * LENGTH)).view(-1, LENGTH)
    assert found["tokens"] == ids_BT.numel()
    for index, (layer, rows_BTH) in enumerate(memory.addresses(ids_BT).items()):
        here = found["layers"][str(layer)]
        counts_R = np.bincount(rows_BTH.numpy().ravel(), minlength=memory.geometry.num_rows(index))
        assert here["rows"] == memory.geometry.num_rows(index)
        assert here.items() >= row_traffic(counts_R).items()
        for place, (order, collided) in enumerate(here["orders"].items()):
            heads = rows_BTH.reshape(-1, rows_BTH.shape[2])[:, place * 2 : place * 2 + 2]
            alone = len(torch.unique(heads, dim=0))
            assert collided["distinct"] >= alone, order
            assert (collided["distinct"] == alone) == (collided["same_rows"] == 0)
            assert collided["in_a_head"] == pytest.approx(collided["in_a_head_expected"], abs=0.05)


def test_every_dialect_hashes_about_as_evenly_as_chance(tokens):
    memory = tiny_model("paper").model.memory
    for layer in memory_traffic(memory, tokens, length=LENGTH)["layers"].values():
        assert layer["untouched"] == pytest.approx(layer["untouched_expected"], abs=0.03)


def test_distinct_rows_are_counted_in_windows_of_a_thousand_tokens(tmp_path):
    ids = [*range(3, 23)] * 150  # 20 tokens over and over: 20 rows a head, and those at a window's start
    model = tiny_model("qwen_next")
    tokens = token_set(tmp_path, vocab_size=VOCABULARY, train=ids, validation=ids)
    layer = memory_traffic(model.model.memory, tokens, length=20, window_tokens=2000)["layers"]["1"]
    assert layer["lookups_per_1000_tokens"] == 4000
    heads = 4
    assert 14 * heads < layer["distinct_rows_per_1000_tokens"] <= 20 * heads + 6
