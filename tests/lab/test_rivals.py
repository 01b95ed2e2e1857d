"""Rivals of the memory: each against its published equation written as a loop, and as part of the model."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from engrammar.model.budget import count_parameters, solve_budget
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.model.presets import preset
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.recipe import load_recipe
from engrammar_lab.rivals import RIVALS, rival_from_json
from engrammar_lab.rivals.modeling import (
    EngrammarRivalConfig,
    EngrammarRivalForCausalLM,
    RivalShare,
    build_lab_config,
)
from models import END, VOCABULARY, tiny_config, tiny_model

SMALL = {
    "over_encoding": {"kind": "over_encoding", "rows": 23},
    "per_layer": {"kind": "per_layer", "width": 5},
    "bigram": {"kind": "bigram", "rows": 61},
    "product_keys": {"kind": "product_keys", "num_keys": 7, "top_k": 3, "query_dim": 6, "num_heads": 3},
}
kinds = pytest.mark.parametrize("kind", RIVALS)


def model_with(kind: str, num_branches: int = 1) -> EngrammarForCausalLM:
    model = tiny_model(None, num_branches, kind=EngrammarRivalConfig, rival=SMALL[kind])
    with torch.no_grad():
        for parameter in model.model.rival.parameters():
            parameter.normal_()
    return model


def some_ids(seed: int = 0) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    ids[0, 4] = END
    return ids


def history(ids: list[int], t: int, back: int, missing: int) -> int:
    """The id `back` positions before t, or `missing` where an end of text or the start of the row lies between."""
    if back > t or END in ids[t - back : t]:
        return missing
    return ids[t - back]


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def test_over_encoding_is_the_mean_of_projected_ngrams():
    rival = model_with("over_encoding").model.rival
    ids, embeds = some_ids(), torch.randn(2, 9, 32)
    ours = rival.embed(embeds, rival.read(ids, None))
    sizes = rival.plan[1].table_sizes[0]
    assert len(set(sizes[0] + sizes[1])) == 8 and min(sizes[0] + sizes[1]) >= 23
    for b in range(2):
        row_ids = ids[b].tolist()
        for t in range(9):
            total, first_row, slot = embeds[b, t].clone(), 0, 0
            for order, sizes_K in zip((2, 3), sizes):
                ngram = sum(history(row_ids, t, back, 0) * VOCABULARY**back for back in range(order))
                for size in sizes_K:
                    matrix = rival.projection.weight[:, 8 * slot : 8 * slot + 8]
                    total += matrix @ rival.weight[first_row + ngram % size]
                    first_row, slot = first_row + size, slot + 1
            torch.testing.assert_close(ours[b, t], total / 9)


@pytest.mark.parametrize("branches", [1, 2])
def test_per_layer_gates_the_tokens_own_row(branches):
    rival = model_with("per_layer", branches).model.rival
    ids, streams = some_ids(), torch.randn(2, 9, branches, 32)
    for layer in (0, 3):
        ours = rival.before(layer, streams, rival.read(ids, None)) - streams
        for b, t in ((0, 0), (1, 8), (0, 5)):
            x = normed(streams[b, t].mean(0), rival.input_norms[layer])
            gate = torch.nn.functional.gelu(rival.gates[layer].weight @ x, approximate="tanh")
            row = rival.weight[layer * VOCABULARY + int(ids[b, t])] * math.sqrt(5)
            added = normed(rival.ups[layer].weight @ (gate * row), rival.output_norms[layer])
            for m in range(branches):
                torch.testing.assert_close(ours[b, t, m], added, atol=1e-5, rtol=1e-5)


def test_bigram_adds_a_scaled_row_before_every_block():
    rival = model_with("bigram").model.rival
    ids, streams = some_ids(), torch.randn(2, 9, 1, 32)
    for layer in range(4):
        ours = rival.before(layer, streams, rival.read(ids, None))
        for b in range(2):
            for t in range(9):
                previous = history(ids[b].tolist(), t, 1, -1)
                row = 60 if previous < 0 else ((36313 * int(ids[b, t])) ^ (27191 * previous)) % 60
                expected = streams[b, t, 0] + rival.scales[layer] * rival.weight[row]
                torch.testing.assert_close(ours[b, t, 0], expected)


def test_product_keys_find_the_best_of_all_pairs():
    rival = model_with("product_keys").model.rival
    streams = torch.randn(2, 5, 2, 32)
    assert rival.before(0, streams, None) is streams
    ours = rival.before(1, streams, None) - streams
    for b in range(2):
        for t in range(5):
            x = normed(streams[b, t].mean(0), rival.input_norm)
            added = torch.zeros(32)
            for head in range(3):
                query = normed(rival.query.weight[6 * head : 6 * head + 6] @ x, rival.query_norm[head])
                scores = torch.stack(
                    [
                        (query[:3] @ rival.keys[head, 0, i] + query[3:] @ rival.keys[head, 1, j])
                        for i in range(7)
                        for j in range(7)
                    ]
                )
                best, rows = scores.topk(3)  # over all n*n keys: the published claim is that the shortcut is exact
                added += best.softmax(0) @ rival.weight[rows]
            torch.testing.assert_close(ours[b, t, 1], added, atol=1e-4, rtol=1e-4)


@kinds
def test_nothing_reaches_across_an_end_of_text_or_out_of_padding(kind):
    rival, ids, embeds = model_with(kind).model.rival, some_ids(), torch.randn(1, 5, 1, 32)
    other = ids[:1].clone()
    other[0, :4] = 7
    added = []
    for row in (ids[:1], other):
        read = rival.read(row, None)
        read = None if read is None else read[:, 4:]
        start = rival.embed(embeds[:, :, 0], read)
        added.append((start, rival.before(1, embeds, read)))
    for mine, theirs in zip(*added):
        torch.testing.assert_close(mine[:, 1:], theirs[:, 1:], atol=0, rtol=0)
    model, mask = model_with(kind), torch.ones(1, 9, dtype=torch.long)
    mask[0, :3] = 0
    padded = ids[1:].clone()
    padded[0, :3] = 11
    outputs = [model(row, attention_mask=mask, use_cache=False).logits[:, 3:] for row in (ids[1:], padded)]
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-6)  # attention sums in another order


def test_packed_texts_are_read_apart():
    model, ids = model_with("bigram"), some_ids()[1:]
    rival = model.model.rival
    starts = torch.zeros(1, 9, dtype=torch.bool)
    starts[0, 5] = True
    assert rival.rows(ids, starts)[0, 5] == 60
    assert rival.rows(ids, None)[0, 5] != 60


@kinds
def test_total_and_active_parameters_stay_as_in_the_plain_model(kind):
    plain = preset("micro", memory=None, n_routed_experts=32)
    solved = solve_budget(plain, RivalShare(rival=rival_from_json({"kind": kind})), rho=0.8)
    before, after = count_parameters(plain), count_parameters(solved)
    assert after.total_parameters == pytest.approx(before.total_parameters, rel=5e-3)
    assert after.active_parameters == pytest.approx(before.active_parameters, rel=5e-3)
    assert after.rho == pytest.approx(0.8, abs=0.01)
    assert after.memory_parameters == EngrammarRivalForCausalLM(solved).model.rival.weight.numel()


@kinds
def test_saved_and_loaded_it_is_the_same_and_still_a_table(kind, tmp_path):
    model = model_with(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.rival == model.config.rival
    torch.testing.assert_close(loaded(some_ids()).logits, model(some_ids()).logits, atol=0, rtol=0)
    groups = build_optimizer(loaded, lr=1.0, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8).param_groups
    memory = next(group for group in groups if group["name"] == "memory")
    assert [id(param) for param in memory["params"]] == [id(loaded.model.rival.weight)]
    assert memory["lr"] == 5.0


@kinds
def test_a_step_moves_touched_rows_alone(kind):
    model, ids = model_with(kind).train(), some_ids()
    before = model.model.rival.weight.detach().clone()
    optimizer = build_optimizer(
        model, OptimizerSettings(max_grad_norm=1.0), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8
    )
    model(ids, labels=ids).loss.backward()
    gradient = model.model.rival.weight.grad
    assert gradient.is_sparse
    touched = torch.zeros(len(before), dtype=torch.bool)
    touched[gradient.coalesce().indices()[0]] = True
    optimizer.step()
    moved = (model.model.rival.weight != before).any(1)
    assert moved.any() and not moved[~touched].any() and not touched.all()


@kinds
def test_another_token_changes_no_earlier_logit(kind):
    model, ids = model_with(kind), some_ids()
    changed = ids.clone()
    changed[:, 6] = 5
    ours, theirs = model(ids).logits, model(changed).logits
    torch.testing.assert_close(ours[:, :6], theirs[:, :6], atol=0, rtol=0)
    assert not torch.equal(ours[:, 6], theirs[:, 6])


def test_flops_are_those_of_the_products():
    plain, rival, ids = tiny_model(None), model_with("per_layer"), some_ids()

    def flops(model: EngrammarForCausalLM) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, use_cache=False)
        return counter.get_total_flops()

    assert flops(rival) - flops(plain) == 18 * 4 * 2 * 2 * 32 * 5  # tokens, layers, two products, 2 FLOPs a weight


def test_ngrams_are_not_read_on_from_a_cache():
    for kind in ("over_encoding", "bigram"):
        with pytest.raises(ValueError, match="use_cache=False"):
            model_with(kind).generate(some_ids(), max_new_tokens=2, do_sample=False)
    model, ids = model_with("per_layer"), some_ids()[1:]
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, **settings, use_cache=False))


@pytest.mark.parametrize(
    ("rival", "message"),
    [
        ({"kind": "attention"}, "rival.kind is 'attention'; allowed: over_encoding, per_layer, bigram, product_keys"),
        ({"kind": "bigram", "width": 3}, "unknown settings width; bigram knows rows"),
        ({"kind": "per_layer", "width": 0}, "rival.width is 0; allowed: an integer of 1 or more"),
        ({"kind": "product_keys", "layer": 4}, "rival.layer is 4; allowed: 0 to 3"),
        ({"kind": "product_keys", "num_keys": 3}, "rival.num_keys is 3; allowed: top_k=16 or more"),
        ({"kind": "over_encoding", "num_tables": 5}, "rival.num_tables is 5; allowed: divisors of 32"),
    ],
)
def test_settings_that_do_not_fit_are_refused(rival, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(None, kind=EngrammarRivalConfig, rival=rival)


def test_memory_and_rival_are_refused_together():
    with pytest.raises(ValueError, match="stands in memory's place"):
        tiny_config("paper", kind=EngrammarRivalConfig, rival=SMALL["bigram"])
    recipe = load_recipe("lab", ("model.settings.rival.kind=bigram",))
    with pytest.raises(ValueError, match="model.memory is 'budget'"):
        build_lab_config(recipe.model, None, None)
    with pytest.raises(ValueError, match="without memory"):
        rival = rival_from_json(SMALL["bigram"])
        solve_budget(
            tiny_config(None, kind=EngrammarRivalConfig, rival=SMALL["bigram"]), RivalShare(rival=rival), rho=0.5
        )
    with pytest.raises(ValueError, match="no room for rival.num_keys=40"):
        rival = rival_from_json({"kind": "product_keys", "num_keys": 40, "top_k": 40})
        solve_budget(preset("micro", memory=None), RivalShare(rival=rival), rho=0.9)


def test_configs_from_before_a_setting_load_as_before():
    config = tiny_config("paper")
    old = config.to_dict()
    old["memory"] = {key: value for key, value in old["memory"].items() if key != "branch_keys"}
    assert EngrammarConfig.from_dict(old).to_dict() == config.to_dict()
