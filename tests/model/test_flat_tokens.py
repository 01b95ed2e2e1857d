"""Flat tokens of many sequences, as engines batch them: each has a history and a window of its own."""

from dataclasses import replace

import pytest
import torch

from engrammar.config import DIALECTS
from engrammar.model.modeling import EngrammarModel, check_attention
from models import END, VOCABULARY, tiny_config, tiny_model

LENGTHS = (9, 1, 14)


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    ids[2][4] = END
    return ids


def look_back(values: torch.Tensor, back: int, fill: float) -> torch.Tensor:
    """Of each position of a text [T, ...], what stands `back` positions before it."""
    return torch.cat([torch.full_like(values[:back], fill), values[: len(values) - back]])[: len(values)]


def flat_pass(model, ids: list[torch.Tensor], with_windows: bool = True, use_cache: bool = False):
    """A pass over texts that are laid end to end in one row."""
    memory, config = model.model.memory, model.model.memory.config
    num_back = config.max_ngram_size - 1
    history = torch.cat([torch.stack([look_back(one, k, -1) for k in range(num_back, 0, -1)], 1) for one in ids])
    retrieved = memory.retrieve(torch.cat(ids)[None], history=history[None])

    def taps(normed_BCT: torch.Tensor) -> torch.Tensor:
        parts = normed_BCT[0].T.split([len(one) for one in ids])
        backs = [k * config.max_ngram_size for k in reversed(range(config.conv_kernel))]
        return torch.cat([torch.stack([look_back(part, back, 0) for back in backs], 1) for part in parts])[None]

    windows = dict.fromkeys(config.layers, taps) if with_windows and config.conv_kernel else {}
    return model.model(torch.cat(ids)[None], retrieved=replace(retrieved, windows=windows), use_cache=use_cache)


def without_attention(model) -> None:
    """Attention would look from text to text here; an engine's does not."""
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("branches", [1, 3])
@torch.no_grad()
def test_flat_tokens_get_what_their_own_text_gives(dialect, branches):
    model, ids = tiny_model(dialect, branches), texts()
    without_attention(model)
    alone = [model.model(one[None], use_cache=False)[0][0] for one in ids]
    flat = flat_pass(model, ids)[0][0]
    torch.testing.assert_close(flat, torch.cat(alone), atol=1e-5, rtol=0)
    as_one_text = model.model(torch.cat(ids)[None], use_cache=False)[0][0]  # control: a text of its own is needed
    assert not torch.allclose(as_one_text, torch.cat(alone), atol=1e-3)


def test_flat_tokens_without_windows_are_refused():
    with pytest.raises(ValueError, match="not a convolution window of its own"):
        flat_pass(tiny_model("paper"), texts(), with_windows=False)


def test_flat_tokens_leave_no_cache_that_could_be_continued():
    assert flat_pass(tiny_model("paper"), texts(), use_cache=True).past_key_values is None


def test_an_engine_that_gives_no_history_is_refused():
    """vLLM sets this attention before it makes the model (`docs/serving-vllm.md`)."""
    config = tiny_config("paper")
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match="cannot serve a model with memory as it is"):
        EngrammarModel(config)
    check_attention(config, flat_tokens=True)
    plain = tiny_config(None)
    plain._attn_implementation = "vllm"
    check_attention(plain, flat_tokens=False)
