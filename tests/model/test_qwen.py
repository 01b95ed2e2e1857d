"""The qwen_next dialect against transformers' own Qwen4Exp modules, on random weights at small sizes."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding, Qwen4ExpTextPLELayer

from engrammar.addressing import derive_geometry, hash_ngrams, look_back
from engrammar.config import DIALECTS, Geometry, MemoryConfig
from engrammar.fusion import Fusion
from engrammar.table import MemoryTable

VOCABULARY, END, HIDDEN, BRANCHES = 97, 5, 11, 3


def theirs(ngram_size: int = 3, heads: int = 2, base: int = 53, **settings) -> Qwen4ExpTextConfig:
    return Qwen4ExpTextConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 4,
            "hc_count": BRANCHES,
            "ple_layer_ids": [2, 4],  # counted from 1
            "ple_embed_dim": (ngram_size - 1) * heads * 3,
            "ple_conv_kernel_size": 4,
            "ngram_size": ngram_size,
            "heads_per_ngram": heads,
            "ngram_vocab_size_base": base,
            "make_ngram_vocab_size_divisible_by": 128,
            "eos_token_id": END,
            "seed": 1234,
            **settings,
        }
    )


def ours(config: Qwen4ExpTextConfig) -> tuple[MemoryConfig, Geometry]:
    memory = replace(
        DIALECTS["qwen_next"],
        layers=tuple(layer - 1 for layer in config.ple_layer_ids),
        rows_per_head=(config.ngram_vocab_size_base,) * (config.ngram_size - 1),
        max_ngram_size=config.ngram_size,
        num_heads=config.heads_per_ngram,
        head_dim=3,
        fill_id=END,
        end_ids=(END,),
    )
    return memory, derive_geometry(memory, num_classes=VOCABULARY, fill_class=END)


def random_ids(batch: int = 3, num_tokens: int = 29, seed: int = 0) -> torch.Tensor:
    """Ids with ends inside: one at the very start, two in a row, one at the very end."""
    generator = torch.manual_seed(seed)
    ids_BT = torch.randint(0, VOCABULARY, (batch, num_tokens), generator=generator)
    ids_BT[torch.rand(batch, num_tokens, generator=generator) < 0.15] = END
    ids_BT[0, [0, 8, 9, -1]] = END
    return ids_BT


def rows_of(ids_BT, memory, geometry, index, history_BS=None) -> torch.Tensor:
    looked_back = look_back(ids_BT, config=memory, geometry=geometry, history_BS=history_BS)
    return hash_ngrams(looked_back, config=memory, geometry=geometry, layer_index=index)


def their_rows(embedding: Qwen4ExpTextNGramEmbedding, ids_BT, cache=None) -> torch.Tensor:
    """What their embedding is asked for: rows of all heads end to end."""
    asked = []
    hook = embedding.ngram_embedding.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    embedding(ids_BT, cache)
    hook.remove()
    return asked[0]


def build_pair(config: Qwen4ExpTextConfig, index: int) -> tuple[Qwen4ExpTextPLELayer, Fusion, MemoryTable]:
    """Their layer with random weights (convolution and norms included), and ours with the same."""
    memory, geometry = ours(config)
    layer = Qwen4ExpTextPLELayer(config, memory.layers[index], index)
    generator = torch.manual_seed(index)
    fusion = Fusion(memory, hidden_size=HIDDEN, num_branches=BRANCHES)
    table = MemoryTable(memory, geometry, index)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
        for name in ("norm_key", "norm_query", "norm_conv"):
            getattr(layer, name).weight.mul_(0.3)
    fusion.load_state_dict(
        {
            "projection.weight": torch.cat([layer.value_proj.weight, layer.key_proj.weight]),
            "key_norm": 1 + layer.norm_key.weight.view(BRANCHES, HIDDEN),
            "query_norm": 1 + layer.norm_query.weight.view(BRANCHES, HIDDEN),
            "conv_norm": 1 + layer.norm_conv.weight.view(BRANCHES, HIDDEN),
            "conv_weight": layer.conv1d.weight,
        }
    )
    table.load_state_dict({"weight": layer.ple_embedding.ngram_embedding.weight})
    return layer, fusion, table


@pytest.mark.parametrize(
    ("ngram_size", "heads", "base"), [(3, 2, 53), (2, 1, 7), (3, 8, 1000), (4, 3, 64), (5, 2, 211)]
)
@pytest.mark.parametrize("index", [0, 1])
def test_addresses_equal_to_the_bit(ngram_size, heads, base, index):
    config = theirs(ngram_size, heads, base)
    memory, geometry = ours(config)
    embedding = Qwen4ExpTextNGramEmbedding(config, config.ple_embed_dim, memory.layers[index], index)
    assert geometry.multipliers[index] == tuple(embedding.layer_multipliers.tolist())
    assert [size for order in geometry.table_sizes[index] for size in order] == embedding.head_vocab_sizes
    ids_BT = random_ids()
    rows_BTH = rows_of(ids_BT, memory, geometry, index)
    assert torch.equal(rows_BTH, their_rows(embedding, ids_BT))


@pytest.mark.parametrize("divisor", [1, 7, 128])
def test_rows_are_padded_as_theirs(divisor):
    config = theirs(make_ngram_vocab_size_divisible_by=divisor)
    memory, _ = ours(config)
    memory = replace(memory, rows_multiple=divisor)
    geometry = derive_geometry(memory, num_classes=VOCABULARY, fill_class=END)
    for index, layer in enumerate(memory.layers):
        embedding = Qwen4ExpTextNGramEmbedding(config, config.ple_embed_dim, layer, index)
        assert geometry.num_rows(index) == embedding.total_vocab_size
        assert geometry.num_stored_rows(index) == embedding.ngram_embedding.num_embeddings
        assert geometry.head_offsets(index) == tuple(embedding.head_offsets)


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("ngram_size", [2, 3, 4])
def test_outputs_equal_within_1e_5(index, ngram_size):
    config = theirs(ngram_size)
    memory, geometry = ours(config)
    layer, fusion, table = build_pair(config, index)
    ids_BT = random_ids()
    hidden_BTMD = torch.randn(*ids_BT.shape, BRANCHES, HIDDEN, generator=torch.manual_seed(9))
    expected = layer(hidden_BTMD.flatten(-2), ids_BT, None).unflatten(-1, (BRANCHES, HIDDEN))
    output_BTMD = fusion(hidden_BTMD, table(rows_of(ids_BT, memory, geometry, index)))
    torch.testing.assert_close(output_BTMD, expected, rtol=1e-5, atol=1e-5)
    silent = fusion.gated_value(hidden_BTMD, table(rows_of(ids_BT, memory, geometry, index)))
    assert (silent - expected).abs().max() > 0.1  # the convolution has a say


@torch.no_grad()
@pytest.mark.parametrize("padding", [1, 2, 10])
def test_left_padding_is_silent_as_theirs(padding):
    config = theirs()
    memory, geometry = ours(config)
    layer, fusion, table = build_pair(config, 0)
    ids_BT = random_ids()
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    mask_BT[1, :padding] = False
    hidden_BTMD = torch.randn(*ids_BT.shape, BRANCHES, HIDDEN, generator=torch.manual_seed(9))
    their_ids = torch.where(mask_BT, ids_BT, END)  # as Qwen4ExpTextModel does
    expected = layer(hidden_BTMD.flatten(-2), their_ids, None, conv_mask=mask_BT.long())
    rows_BTH = rows_of(torch.where(mask_BT, ids_BT, -1), memory, geometry, 0)
    output_BTMD = fusion(hidden_BTMD, table(rows_BTH), ~mask_BT)
    torch.testing.assert_close(output_BTMD.flatten(-2), expected, rtol=1e-5, atol=1e-5)
    assert (output_BTMD[1, :padding] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("edges", [[0, 1, 29], [0, 13, 29], [0, 9, 10, 11, 12, 29], list(range(30))], ids=str)
@pytest.mark.parametrize("index", [0, 1])
def test_cached_chunks_equal_theirs(edges, index):
    config = theirs()
    memory, geometry = ours(config)
    layer, fusion, table = build_pair(config, index)
    ids_BT = random_ids()
    hidden_BTMD = torch.randn(*ids_BT.shape, BRANCHES, HIDDEN, generator=torch.manual_seed(9))
    cache, row_cache = DynamicCache(config=config), DynamicCache(config=config)
    history_BS = torch.full((3, memory.max_ngram_size - 1), -1)
    window_BCS = torch.zeros(3, BRANCHES * HIDDEN, 0)
    for begin, end in zip(edges, edges[1:]):
        ids, hidden = ids_BT[:, begin:end], hidden_BTMD[:, begin:end]
        expected = layer(hidden.flatten(-2), ids, cache).unflatten(-1, (BRANCHES, HIDDEN))
        rows_BTH = rows_of(ids, memory, geometry, index, history_BS)
        assert torch.equal(rows_BTH, their_rows(layer.ple_embedding, ids, row_cache))
        value_BTMD = fusion.gated_value(hidden, table(rows_BTH))
        normed_BCS = torch.cat([window_BCS, fusion.normed_value(value_BTMD)], dim=-1)
        output_BTMD = value_BTMD + fusion.convolve(normed_BCS, end - begin)
        torch.testing.assert_close(output_BTMD, expected, rtol=1e-5, atol=1e-5)
        history_BS = torch.cat([history_BS, ids], dim=1)[:, -history_BS.shape[1] :]
        window_BCS = normed_BCS[..., -memory.conv_window :]
