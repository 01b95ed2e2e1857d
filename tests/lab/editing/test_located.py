"""ROME and MEMIT: their closed forms, the second moments of keys, and facts that are written and taken back."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from attached_models import random_ids, tokenizer
from engrammar.train import parsers
from engrammar.train.corpora import POCKET
from engrammar_lab.editing import covariances
from engrammar_lab.editing.covariances import KeyText, cut, moments, moments_of
from engrammar_lab.editing.located import MemitSettings, RomeSettings, least_squares, memit, rank_one, rome
from engrammar_lab.editing.values import ValueSettings, at_subject, find_values, located, prefixes
from taught_facts import FACTS, all_bits, says, strong_model

VALUES = ValueSettings(steps=40, num_prefixes=2, prefix_tokens=3, most=6.0, together=3)


@pytest.fixture
def keys(tmp_path):
    """A made-up corpus in a cache, so that nothing is fetched."""
    texts = [" ".join(f"w{(i * k) % 29}" for k in range(1, 20)) for i in range(40)]
    lines = [json.dumps(asdict(parsers.Entry(text, text))) for text in texts]
    (tmp_path / f"wiki-{POCKET['wiki'].version}-{parsers.VERSION}.jsonl").write_text("\n".join(lines) + "\n")
    return KeyText(cache=tmp_path, num_tokens=611)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_memits_closed_form_is_plain_least_squares():
    other_NF, key_GF, missing_GD = drawn(40, 7), drawn(3, 7, seed=1), drawn(3, 5, seed=2)
    held = 0.3
    change_DF = least_squares(key_GF, missing_GD, held * other_NF.T @ other_NF / len(other_NF))
    # the same by rows: other keys should get nothing, weighted, and new ones what they miss (MEMIT eq. 10)
    rows_F = torch.cat([other_NF * (held / len(other_NF)) ** 0.5, key_GF])
    wanted_D = torch.cat([torch.zeros(40, 5, dtype=torch.float64), missing_GD])
    expected_DF = torch.linalg.lstsq(rows_F, wanted_D).solution.T
    torch.testing.assert_close(change_DF, expected_DF, atol=1e-5, rtol=1e-5)
    strict = least_squares(key_GF, missing_GD, 1e4 * other_NF.T @ other_NF)
    assert float(strict.abs().max()) < 0.01 * float(change_DF.abs().max())  # other text counts more: less is changed


def test_romes_change_gives_the_value_and_moves_least_elsewhere():
    other_NF, key_F, wanted_D, weight_DF = drawn(40, 7), drawn(7, seed=1), drawn(5, seed=2), drawn(5, 7, seed=3)
    moment_FF = other_NF.T @ other_NF
    change_DF = rank_one(weight_DF, key_F, wanted_D, moment_FF.inverse())
    torch.testing.assert_close((weight_DF + change_DF) @ key_F, wanted_D)
    plain_DF = torch.outer(wanted_D - weight_DF @ key_F, key_F) / key_F.square().sum()  # it ignores other text
    torch.testing.assert_close((weight_DF + plain_DF) @ key_F, wanted_D)
    assert (change_DF @ other_NF.T).norm() < (plain_DF @ other_NF.T).norm()


def test_second_moments_are_those_of_a_plain_loop_and_are_kept(keys, monkeypatch):
    model = strong_model()
    monkeypatch.setattr(covariances, "LENGTH", 50)
    found = moments(model, tokenizer(), [1, 3], keys)
    batches = [*cut(tokenizer(), [json.loads(line)["text"] for line in _lines(keys)], keys.num_tokens)]
    assert sum(batch.numel() for batch in batches) == keys.num_tokens
    read = {1: [], 3: []}
    for block, own in read.items():
        model.model.layers[block].mlp.down_proj.register_forward_pre_hook(lambda _, args, own=own: own.append(args[0]))
    for batch in batches:
        for row in batch:
            model(row[None])
    for block, own in read.items():
        rows = torch.cat([one[0] for one in own]).detach().double()
        expected = sum(torch.outer(row, row) for row in rows) / len(rows)
        torch.testing.assert_close(found[block].double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    monkeypatch.setattr(covariances, "moments_of", lambda *_: pytest.fail("computed again"))
    again = moments(model, tokenizer(), [3], keys)
    assert torch.equal(again[3], found[3])
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    for other in (keys, replace(keys, num_tokens=600)):  # of another model, or another length
        with pytest.raises(pytest.fail.Exception):
            moments(model if other is keys else strong_model(), tokenizer(), [3], other)


def _lines(keys):
    (path,) = keys.cache.glob("wiki-*.jsonl")
    return path.read_text().splitlines()


def test_a_corpus_that_is_too_short_is_refused(keys):
    with pytest.raises(ValueError, match="has 800 tokens only"):
        moments(strong_model(), tokenizer(), [1], replace(keys, num_tokens=5000))


def test_values_make_facts_said_and_do_not_depend_on_the_batch():
    model = strong_model()
    before = prefixes(model, tokenizer(), VALUES, 0)
    texts = [at_subject(tokenizer(), fact, before) for fact in FACTS]
    assert [len(own) for own in texts] == [3, 3, 3, 3] and len(before) == 2
    together = find_values(model, texts, 1, replace(VALUES, together=4, stop=0.5))
    alone = torch.cat([find_values(model, [own], 1, replace(VALUES, stop=0.5)) for own in texts])
    torch.testing.assert_close(together, alone, atol=5e-2, rtol=5e-2)
    nothing = find_values(model, texts, 1, replace(VALUES, steps=0))
    assert not nothing.any() and together.any(1).all()


def test_the_subject_is_found_where_it_ends():
    ids, place = located(tokenizer(), "w1 w2 w12 w10", 6, FACTS[3])
    assert tokenizer().decode(ids[place]) == "w12" and place == 2


def settings_of(way, keys):
    shared = {"keys": keys, "values": VALUES}
    return RomeSettings(block=1, **shared) if way is rome else MemitSettings(blocks=(0, 1), held=0.01, **shared)


@pytest.mark.parametrize("way", [memit, rome])
def test_facts_are_written_and_taken_back_to_the_bit(way, keys):
    model = strong_model()
    ids, before = random_ids(2, 9), all_bits(model)
    logits = model(ids).logits
    assert not any(says(model, fact) for fact in FACTS)
    edited = way(model, tokenizer(), FACTS, 0, settings_of(way, keys))
    assert sum(says(model, fact) for fact in FACTS) >= 2
    blocks = [1] if way is rome else [0, 1]
    changed = {name for (name, one), bits in zip(model.named_parameters(), before) if not torch.equal(one, bits)}
    assert changed == {f"model.layers.{block}.mlp.down_proj.weight" for block in blocks}
    assert edited.num_bytes == len(blocks) * 4 * min(len(FACTS) * (32 + 48), 32 * 48)
    edited.undo()
    assert all(torch.equal(one, bits) for one, bits in zip(model.parameters(), before))
    assert torch.equal(model(ids).logits, logits)


def test_memit_at_one_block_with_one_fact_is_nearly_rome(keys):
    """Without other text's keys both give the key its value; with them MEMIT gives a part of it."""
    changes = []
    values = replace(VALUES, num_prefixes=0, kl=0.0)
    for held in (1e-6, 100.0):
        model = strong_model()
        memit(model, tokenizer(), FACTS[:1], 0, MemitSettings(blocks=(1,), held=held, keys=keys, values=values))
        changes.append(model.model.layers[1].mlp.down_proj.weight - strong_model().model.layers[1].mlp.down_proj.weight)
    model = strong_model()
    rome(model, tokenizer(), FACTS[:1], 0, RomeSettings(block=1, keys=keys, values=values))
    by_rome = model.model.layers[1].mlp.down_proj.weight - strong_model().model.layers[1].mlp.down_proj.weight
    by_rome, changes = by_rome.detach(), [one.detach() for one in changes]
    torch.testing.assert_close(changes[0], by_rome, rtol=0.02, atol=0.01 * float(by_rome.abs().max()))
    assert float(changes[1].norm()) < 0.5 * float(by_rome.norm())


def test_a_subject_at_the_first_token_only_is_refused(keys):
    values = replace(VALUES, num_prefixes=0)
    first = replace(FACTS[3], subject="w12", prompt="w12 w10")
    made = MemitSettings(blocks=(1,), held=0.01, keys=keys, values=values)
    edited = memit(strong_model(), tokenizer(), [first, FACTS[0]], 0, made)
    assert list(edited.refused) == [first]


def test_moments_without_a_block_below_the_last_are_read_too():
    ids = random_ids(2, 9)
    assert moments_of(strong_model(), [ids], [3])[3].shape == (48, 48)
