"""A static cache, with which `generate` compiles on a GPU, gives the logits of full passes of the same model."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, StaticCache

from engrammar.config import DIALECTS
from engrammar.off import memory_off
from engrammar.stores.serving import stored_tables_of
from generated import EXACT, check_generated, full
from models import VOCABULARY, tiny_config, tiny_model

NEW, PAD = 7, 0
LENGTHS = [11, 4, 1]
GREEDY = {
    "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None,
    "return_dict_in_generate": True, "output_logits": True, "cache_implementation": "static",
}  # fmt: skip
MODELS = [*((dialect, 1) for dialect in DIALECTS), ("paper", 2), ("deepseek_v41", 2)]


def padded(lengths: list[int], seed: int = 5) -> tuple[Tensor, Tensor]:
    """Rows of random ids, padded on the left, and their mask."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=draw)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def generate(model: nn.Module, lengths: list[int], **settings):
    ids, mask = padded(lengths)
    return model.generate(ids, attention_mask=mask, **{**GREEDY, **settings})


@pytest.mark.parametrize(("dialect", "branches"), MODELS)
@pytest.mark.parametrize(
    "settings", [{}, {"prefill_chunk_size": 3}, {"do_sample": True}], ids=["", "chunks", "sampled"]
)
def test_steps_equal_full_passes(dialect, branches, settings):
    model = tiny_model(dialect, branches)
    torch.manual_seed(0)
    check_generated(model, generate(model, LENGTHS, **settings), LENGTHS)
    check_generated(model, generate(model, [9, 9], **settings), [9, 9])


def test_beams_are_those_of_a_cache_that_grows():
    model, ids = tiny_model("paper", 2), padded(LENGTHS)
    how = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    static = generate(model, LENGTHS, **how)
    growing = model.generate(ids[0], attention_mask=ids[1], **{**GREEDY, **how, "cache_implementation": None})
    assert torch.equal(static.sequences, growing.sequences)
    torch.testing.assert_close(static.sequences_scores, growing.sequences_scores, **EXACT)


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_rows_from_stores(where, tmp_path):
    model = tiny_model("paper", 2)
    model.save_pretrained(tmp_path)
    served = AutoModelForCausalLM.from_pretrained(tmp_path, memory=where).eval()
    check_generated(model, generate(served, LENGTHS), LENGTHS)
    stored_tables_of(served).close()


@torch.no_grad()
def test_a_cache_goes_on_from_any_split_and_is_used_again_after_a_reset():
    model = tiny_model("paper", 2)
    cache = StaticCache(config=model.config, max_cache_len=30)
    for seed, sizes in enumerate(([7, 1, 1, 5, 3], [1] * 17, [2, 15])):
        ids, mask = padded([17, 12], seed)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        parts, seen = [], 0
        for part in ids.split(sizes, dim=1):
            end = seen + part.shape[1]
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, seen:end]}
            parts.append(model(part, past_key_values=cache, use_cache=True, **given).logits)
            seen = end
        for row, length in enumerate((17, 12)):
            logits = full(model, ids[row : row + 1, -length:])[0]
            torch.testing.assert_close(torch.cat(parts, 1)[row, -length:], logits, **EXACT)
        cache.reset()


@torch.no_grad()
def test_without_its_state_the_logits_are_others():
    """The control: what the cache keeps for the memory is what makes the steps right."""
    model, (ids, _) = tiny_model("paper", 2), padded([12])
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(ids[:, :11], past_key_values=cache, use_cache=True)
    for layer in model.model.memory.config.layers:
        for state in cache.layers[layer].conv_states.values():
            state.zero_()
    forgotten = model(ids[:, 11:], past_key_values=cache, use_cache=True).logits[0, 0]
    assert float((forgotten - full(model, ids)[0, -1]).abs().max()) > 1e-3
    with memory_off(model):
        cache = StaticCache(config=model.config, max_cache_len=20)
        model(ids[:, :11], past_key_values=cache, use_cache=True)
        off = model(ids[:, 11:], past_key_values=cache, use_cache=True).logits[0, 0]
        torch.testing.assert_close(off, full(model, ids)[0, -1], **EXACT)


def test_a_plain_model_has_one_too():
    model = tiny_model(None)
    check_generated(model, generate(model, LENGTHS), LENGTHS)


@pytest.mark.slow
def test_decoding_is_compiled_and_equal():
    one = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    model = tiny_model("paper", 2, **one, memory={**tiny_config("paper").memory, "layers": [1]})
    model.model.memory.require_classes()
    how = CompileConfig(backend="eager", mode=None, fullgraph=False)
    how._compile_all_devices = True
    torch.compiler.reset()
    check_generated(model, generate(model, [11, 4], compile_config=how), [11, 4])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()
