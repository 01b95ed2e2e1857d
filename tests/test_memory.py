"""The one door to rows: a pass reads the rows of the whole text, however much of it was seen before, or refuses."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from engrammar.addressing import derive_geometry
from engrammar.config import DIALECTS, MemoryConfig
from engrammar.memory import Memory
from engrammar.vocabulary import compress_vocabulary
from models import END, VOCABULARY, tiny_config, tiny_model


def tiny(dialect: str) -> Memory:
    return tiny_model(dialect).model.memory


def some_ids(batch: int = 3, num_tokens: int = 17) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (batch, num_tokens), generator=torch.manual_seed(0))
    ids[:, 5] = END  # an end, or a dead id, where the dialect has one
    return ids


def before_each(ids_BT: torch.Tensor, num_back: int) -> torch.Tensor:
    """The ids before each token, [B, T, N-1], -1 where there are none."""
    padded = torch.nn.functional.pad(ids_BT, (num_back, 0), value=-1)
    return padded.unfold(1, num_back, 1)[:, : ids_BT.shape[1]]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_flat_tokens_of_many_sequences_read_the_rows_of_whole_texts(dialect):
    memory, ids = tiny(dialect), some_ids()
    history = before_each(ids, memory.config.max_ngram_size - 1)
    order = torch.randperm(ids.numel(), generator=torch.manual_seed(1))
    flat, flat_history = ids.flatten()[order][None], history.flatten(0, 1)[order][None]
    whole, alone = memory.retrieve(ids), memory.retrieve(flat, history=flat_history)
    without = memory.retrieve(flat)
    for layer in memory.config.layers:
        expected = whole.wait(layer)[0].flatten(0, 1)[order][None]
        assert torch.equal(alone.wait(layer)[0], expected)
        assert not torch.equal(without.wait(layer)[0], expected)  # the history is what tells them apart


def test_a_part_of_a_model_reads_the_rows_of_its_own_layers():
    memory, ids = tiny("paper"), some_ids()
    first, *others = memory.config.layers
    whole = memory.retrieve(ids)
    memory.keep(others)
    kept = memory.retrieve(ids)
    assert others and memory.layers == others and kept.wait(first) == (None, None)
    for layer in others:
        assert torch.equal(kept.wait(layer)[0], whole.wait(layer)[0])
    assert not torch.equal(kept.wait(others[0])[0], whole.wait(first)[0])  # numbered as in the whole model


def test_rows_of_vllm_for_texts_with_pads_and_images_whole_and_in_chunks(golden, v4_tokenizer):
    """The pad is hashed like any token; the image id breaks look-back, is never seen, and adds nothing."""
    reference = json.loads((golden / "deepseek_v41_dead_ids.json").read_text())
    config = DIALECTS["deepseek_v41"]
    classes_V = torch.from_numpy(compress_vocabulary(v4_tokenizer))
    num_classes = int(classes_V.max()) + 1
    geometry = derive_geometry(config, num_classes=num_classes, fill_class=int(classes_V[config.fill_id]))

    def memory_of(config: MemoryConfig) -> Memory:
        memory = Memory(config, geometry, num_ids=len(classes_V), vocab_size=len(classes_V), tables="external")
        memory.set_classes(classes_V)
        return memory

    memory = memory_of(config)
    assert (config.fill_id, config.dead_ids) == (reference["pad_id"], (reference["image_id"],))
    requests = [torch.tensor([ids]) for ids in reference["requests"]]
    rows = {layer: [torch.tensor(one) for one in reference["rows"][str(layer)]] for layer in config.layers}
    for index, ids in enumerate(requests):
        for layer, found in memory.addresses(ids).items():
            assert torch.equal(found[0], rows[layer][index])
    for step in reference["steps"]:  # flat tokens in the middle of several requests
        flat = torch.cat([requests[request][:, first:end] for request, first, end in step], dim=1)
        history = torch.cat([before_each(requests[r], 3)[:, first:end] for r, first, end in step], dim=1)
        for layer, found in memory.addresses(flat, history=history).items():
            assert torch.equal(found[0], torch.cat([rows[layer][r][first:end] for r, first, end in step]))
    pad_as_dead_id = memory_of(replace(config, dead_ids=(2,)))
    assert not torch.equal(pad_as_dead_id.addresses(requests[0])[1][0], rows[1][0])


@torch.no_grad()
def test_the_memory_adds_nothing_at_a_dead_id_unless_it_is_told_to():
    ids = some_ids()
    for positions, silent in (("silent", True), ("fused", False)):
        memory = {**tiny_config("deepseek_v41").memory, "dead_positions": positions}
        model = tiny_model("deepseek_v41", memory=memory)
        added = []
        model.model.layers[1].fusion.register_forward_hook(lambda *call, added=added: added.append(call[-1]))
        model(ids)
        assert bool((added[0][ids == END] == 0).all()) == silent
        assert (added[0][ids != END] != 0).any()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_class_map_that_was_never_set_is_refused(compiled, tmp_path):
    torch._dynamo.reset()
    model = type(tiny_model("paper"))(tiny_config("paper"))
    call = torch.compile(model.model.memory.retrieve, backend="eager") if compiled else model.model.memory.retrieve
    with pytest.raises(Exception, match="class map was never set"):
        call(some_ids())
    with pytest.raises(ValueError, match="class map was never set"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    model.model.memory.set_classes(torch.arange(VOCABULARY) % 41)
    model.model.memory.retrieve(some_ids())


def test_positions_that_go_on_from_earlier_tokens_need_their_history():
    model, ids = tiny_model("paper"), some_ids(1, 6)
    for cached in (True, False):
        for positions in ([[4, 5, 6, 7, 8, 9]], [[0, 1, 2, 7, 8, 9]]):
            with pytest.raises(ValueError, match="no history was given|do not go on from the 0 tokens"):
                model(ids, position_ids=torch.tensor(positions), use_cache=cached)
        with pytest.raises(ValueError, match="no history was given"):  # one decode step of an engine, its mask all ones
            model(ids[:, :1], position_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, 1), use_cache=cached)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="pass use_cache=False if they tell packed documents"):
        model(ids, position_ids=packed)
    alone = torch.cat([model(part).logits for part in (ids[:, :3], ids[:, 3:])], 1)
    torch.testing.assert_close(model(ids, position_ids=packed, use_cache=False).logits, alone, rtol=1e-5, atol=1e-5)


def test_a_pass_refuses_rows_that_it_cannot_fuse():
    model, ids = tiny_model("paper"), some_ids(1, 6)
    retrieved = model.model.memory.retrieve(ids, history=before_each(ids, 2))
    with pytest.raises(ValueError, match="a history of its own"):
        model(ids, retrieved=retrieved)
    with pytest.raises(ValueError, match="needs a model with memory"):
        tiny_model(None)(ids, retrieved=retrieved)
    with pytest.raises(ValueError, match=r"history is \[1, 5, 2\]"):
        model.model.memory.retrieve(ids, history=before_each(ids, 2)[:, 1:])
    with pytest.raises(ValueError, match=r"attention_mask is \[1, 3\]"):
        model.model.memory.retrieve(ids, torch.ones(1, 3))


@torch.no_grad()
@pytest.mark.parametrize("dialect", DIALECTS)
def test_rows_retrieved_ahead_give_the_same_logits_cached_and_not(dialect):
    model, ids = tiny_model(dialect), some_ids()
    expected = model(ids).logits
    assert torch.equal(model(ids, retrieved=model.retrieve(ids)).logits, expected)
    cache = DynamicCache(config=model.config)
    parts = []
    for first, end in ((0, 7), (7, 8), (8, 17)):
        retrieved = model.retrieve(ids[:, first:end], past_key_values=cache)
        parts.append(model(ids[:, first:end], past_key_values=cache, retrieved=retrieved).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)
