"""What is shown equals what a forward pass does: gates, guesses with and without, rows, and what values promote."""

import math
from functools import partial

import pytest
import torch

from attached_models import attached_model, base_model, tokenizer
from edited_models import OURS, WITH_MEMORY, model_of_kind, small_patch
from engrammar.attach import disabled
from engrammar.attach.attaching import attachment_of
from engrammar.attach.blocks import find_decoder, hidden_of
from engrammar.edit import apply_patch, undo_patch
from engrammar.off import memory_off
from engrammar.reference import hash_ngrams_reference
from engrammar.train.data import train_tokenizer
from engrammar_explore.looking import LookSettings, closer, look, overview, see
from engrammar_explore.pieces import encode

TEXT = "w3 w4 w5 w6 w3 w4 w7 w8 w9"
SETTINGS = LookSettings(num_guesses=5)


@pytest.fixture(scope="module", params=[OURS, WITH_MEMORY])
def model(request):
    return model_of_kind(request.param)


def ids_of(text: str) -> torch.Tensor:
    return tokenizer()(text, return_tensors="pt").input_ids


def memory_and_fusions(model) -> tuple:
    if (attachment := attachment_of(model)) is not None:
        attached = attachment["default"]
        return attached.memory, {layer: attached.fusions[str(layer)] for layer in attached.config.layers}
    memory = model.model.memory
    return memory, {layer: model.model.layers[layer].fusion for layer in memory.config.layers}


def plain_gates(model, text: str) -> dict[int, torch.Tensor]:
    """gate_TM of each layer in plain code: what a block reads, rows by plain look-up, equations 3 and 4."""
    memory, fusions = memory_and_fusions(model)
    ids, decoder, entered = ids_of(text), find_decoder(model), {}

    def enter(layer, _, args, kwargs) -> None:
        entered[layer] = hidden_of(decoder.argument, args, kwargs)

    how = {"with_kwargs": True, "prepend": True}
    hooks = [decoder.blocks[layer].register_forward_pre_hook(partial(enter, layer), **how) for layer in fusions]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    classes_T, found = memory.class_of_id[ids[0]].tolist(), {}
    for index, (layer, fusion) in enumerate(fusions.items()):
        rows = hash_ngrams_reference(classes_T, config=memory.config, geometry=memory.geometry, layer_index=index)
        embedding_TE = memory.table(layer).weight[torch.tensor(rows)].flatten(-2)
        D, gates, eps = fusion.hidden_size, [], fusion.config.key_norm_eps or torch.finfo().eps
        hidden_TMD = entered[layer][0].view(len(rows), -1, D)
        for branch in range(hidden_TMD.shape[1]):
            own = branch if fusion.num_keys > 1 else 0
            key_TD = embedding_TE @ fusion.projection.weight[(own + 1) * D : (own + 2) * D].T
            key_TD, query_TD = (
                x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in (key_TD, hidden_TMD[:, branch])
            )
            score_T = (key_TD * fusion.key_norm[own] * query_TD * fusion.query_norm[branch]).sum(-1) / math.sqrt(D)
            if fusion.config.gate == "signed_root":
                score_T = score_T.sign() * score_T.abs().clamp_min(1e-6).sqrt()
            gates.append(torch.sigmoid(score_T))
        found[layer] = torch.stack(gates, -1)
        if attachment_of(model) is not None:
            found[layer][0] = 0.0  # a first token takes nothing
    return found


@torch.no_grad()
def test_gates_equal_those_of_a_plain_twin(model):
    found = overview(see(model, tokenizer(), TEXT))["memories"]
    plain = plain_gates(model, TEXT)
    assert [one["layer"] for one in found] == list(plain)
    for one in found:
        assert torch.allclose(torch.tensor(one["gates"]), plain[one["layer"]], atol=1e-5, rtol=0)
    other = plain_gates(model, "w9 " + TEXT)  # the control: another text's gates are others
    assert not any(
        torch.allclose(torch.tensor(one["gates"]), other[one["layer"]][:-1], atol=1e-3, rtol=0) for one in found
    )


@torch.no_grad()
def test_guesses_equal_a_pass_and_without_memory_is_the_model_without_to_the_bit(model):
    seen = see(model, tokenizer(), TEXT, SETTINGS)
    logits = model(ids_of(TEXT)).logits[0]
    off = disabled if attachment_of(model) is not None else memory_off
    with off(model):
        without = model(ids_of(TEXT)).logits[0]
    assert torch.equal(seen.without_TV, without) and torch.equal(seen.logits_TV, logits)
    assert not torch.equal(logits, without)
    told = overview(seen)
    for place, token in enumerate(told["tokens"]):
        first, second = logits[place].softmax(-1), without[place].softmax(-1)
        details = closer(seen, place)
        for one in details["guesses"]:
            assert one["with"] == pytest.approx(float(first[one["id"]]), abs=1e-5)
            assert one["without"] == pytest.approx(float(second[one["id"]]), abs=1e-5)
        likely = {*first.topk(5).indices.tolist(), *second.topk(5).indices.tolist()}
        assert {one["id"] for one in details["guesses"]} == likely
        change = float((first * (first.log() - second.log())).sum())
        assert token["change"] == pytest.approx(change, abs=1e-5)
        if place + 1 < len(told["tokens"]):
            assert details["next"]["id"] == told["tokens"][place + 1]["id"]


@torch.no_grad()
def test_rows_norms_and_promoted_tokens_of_a_token(model):
    memory, fusions = memory_and_fusions(model)
    seen = see(model, tokenizer(), TEXT, SETTINGS)
    addresses, place = memory.addresses(ids_of(TEXT)), 5
    for one in closer(seen, place)["memories"]:
        table, fusion = memory.table(one["layer"]).weight, fusions[one["layer"]]
        rows_H = addresses[one["layer"]][0, place]
        shown = [row for order in one["orders"] for row in order["rows"]]
        assert [row["row"] for row in shown] == rows_H.tolist()
        assert [row["norm"] for row in shown] == pytest.approx(table[rows_H].norm(dim=-1).tolist(), abs=1e-5)
        value_D = fusion.projection.weight[: fusion.hidden_size] @ table[rows_H].flatten()
        assert one["value"] == pytest.approx(float(value_D.norm()), abs=1e-4)
        assert sum(order["share"] for order in one["orders"]) == pytest.approx(1.0, abs=1e-4)
        norm = model.model.norm
        scores_V = model.lm_head(norm(value_D))
        best = scores_V.topk(8)
        assert [token["id"] for token in one["promotes"]] == best.indices.tolist()
        assert [token["score"] for token in one["promotes"]] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [token["id"] for token in one["demotes"]] == (-scores_V).topk(8).indices.tolist()
        assert [order["words"] for order in one["orders"]] == [[" w3", " w4"], [" w6", " w3", " w4"]]


def test_ngrams_that_begin_before_the_text_say_so(model):
    orders = closer(see(model, tokenizer(), TEXT), 1)["memories"][0]["orders"]
    assert [(order["words"], order["whole"]) for order in orders] == [(["w3", " w4"], True), (["w3", " w4"], False)]


def test_a_zero_memory_promotes_nothing():
    model = attached_model("llama")
    for table in attachment_of(model)["default"].memory.tables.values():
        torch.nn.init.zeros_(table.weight)
    one = closer(see(model, tokenizer(), TEXT), 4)["memories"][0]
    assert one["value"] == 0.0 and one["promotes"] == [] and one["demotes"] == []


def test_a_plain_model_with_patches_is_compared_with_itself_without_them():
    model = base_model("llama").requires_grad_(False)
    bare = look(model, tokenizer(), TEXT)
    assert bare["memories"] == [] and bare["compare"] is None and "no memory" in bare["notes"][0]
    apply_patch(model, small_patch(model, "one", (8, 10)), tokenizer())  # w3 w4
    told = look(model, tokenizer(), TEXT)
    assert told["compare"] == "patches" and told["patches"] == ["one"]
    assert [token["change"] > 0 for token in told["tokens"]] == [False, True, *[True] * 7]
    assert told["tokens"][0]["change"] == 0.0
    undo_patch(model)
    again = look(model, tokenizer(), TEXT)
    assert again["tokens"] == bare["tokens"] and again["details"] == bare["details"]


@torch.no_grad()
def test_memory_and_patches_are_switched_off_each_by_itself():
    model = model_of_kind(WITH_MEMORY)
    apply_patch(model, small_patch(model, "one", (8, 10)), tokenizer())
    logits = {}
    for compare in ("memory", "patches", "both"):
        logits[compare] = see(model, tokenizer(), TEXT, LookSettings(compare=compare)).without_TV
    undo_patch(model)
    assert torch.equal(logits["patches"], model(ids_of(TEXT)).logits[0])
    with disabled(model):
        assert torch.equal(logits["both"], model(ids_of(TEXT)).logits[0])
        assert not torch.equal(logits["memory"], logits["both"])
    with pytest.raises(ValueError, match="this model has memory"):
        see(model, tokenizer(), TEXT, LookSettings(compare="patches"))


def test_texts_without_tokens_or_with_too_many_are_refused(model):
    for text, said in (("", "no token"), ("w3 " * 20, "20 tokens; allowed: 12")):
        with pytest.raises(ValueError, match=said):
            see(model, tokenizer(), text, LookSettings(most_tokens=12))
    with pytest.raises(ValueError, match="no token 9"):
        closer(see(model, tokenizer(), TEXT), 9)


def test_emoji_and_right_to_left_text_are_whole_characters(tmp_path):
    from transformers import AutoTokenizer

    train_tokenizer(["plain words only"], vocab_size=280, path=tmp_path)
    bytes_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "a 🙂 שלום"
    ids, pieces = encode(bytes_tokenizer, text, 100)
    assert bytes_tokenizer.decode(ids) == text
    assert "".join(piece for piece, part in pieces if part == 0) == text
    emoji = [part for piece, part in pieces if piece.strip() == "🙂"]
    assert emoji == list(range(len(emoji))) and len(emoji) > 1
