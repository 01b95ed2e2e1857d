"""transformers' own Qwen4-Exp model is the twin: with its tables in our stores it gives the same bits in every mode."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import core_model_loading
from transformers.models.qwen4_exp import modeling_qwen4_exp as theirs
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpConfig, Qwen4ExpTextConfig

from engrammar import look_ahead, place_tables
from engrammar.off import memory_off
from engrammar.released import Qwen4ExpForCausalLM, Qwen4ExpForConditionalGeneration, serve_released
from engrammar.stores.base import Fetch, RowsMissing, RowStore
from engrammar.stores.cache import CachedStore
from engrammar.stores.mooncake.pool import PoolServer
from engrammar.stores.mooncake.store import RemoteStore
from engrammar.stores.mooncake.upload import upload
from engrammar.stores.ram import RamStore
from engrammar.stores.serving import ServingSettings, stored_tables_of
from engrammar.tables.convert import quantize
from engrammar.tables.folder import open_tables
from engrammar.tables.released import import_tables
from engrammar_lab.bench.loopback import LoopbackPool, why_no_pool
from models import tiny_model
from released_models import load_all, qwen_release, save_split

VOCABULARY, END = 97, 5
LAYERS = (1, 4)  # the blocks with a table, counted from 0
TIERS = {
    "RAM": {"memory": "ram"},
    "disk": {"memory": "disk"},
    "cache over disk": {"memory": "disk", "cache_rows": 64},
    "RAM, shared by processes": {"memory": "ram", "sharing": "processes"},
    "cache over RAM, by hand": {"memory": lambda table: CachedStore(RamStore(table), 32)},
}


def settings(**changes) -> dict:
    """Five blocks: linear attention, an indexer that leaves tokens out, tables before and after it."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 5,
        "layer_types": ["linear_attention"] * 3 + ["indexed_attention", "linear_attention"],
        "hc_count": 2,
        "hc_lowrank": 4,
        "ple_layer_ids": [layer + 1 for layer in LAYERS],
        "ple_embed_dim": 28,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 53,
        "make_ngram_vocab_size_divisible_by": 16,
        "eos_token_id": END,
        "pad_token_id": 0,
        "split_ngram_parts": 5,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        **changes,
    }


def their_model(dtype: torch.dtype = torch.float32, **changes) -> theirs.Qwen4ExpForCausalLM:
    """transformers' model, whose memory (gates and convolutions included) has a say."""
    torch.manual_seed(0)
    model = theirs.Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**settings(**changes))).eval()
    for name, weight in model.named_parameters():
        if ".ple." in name:
            torch.nn.init.normal_(weight)
    return model.to(dtype)


def tables_in(model) -> list[torch.nn.Module]:
    return [model.model.layers[layer].ple.ple_embedding.ngram_embedding for layer in LAYERS]


def released(model, folder: Path, **how) -> tuple[Path, Path]:
    """The folders of the model as it is released, and of its tables."""
    release = qwen_release(model, folder / "release", layers=LAYERS, **how)
    import_tables(release, folder / "tables")
    return release, folder / "tables"


def random_ids(batch: int = 3, length: int = 23, seed: int = 1) -> torch.Tensor:
    """Ids with ends inside, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(END + 1, VOCABULARY, (batch, length), generator=generator)
    ids[0, length // 2] = END
    return ids


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' model and the folders of its release and tables."""
    model = their_model()
    return model, *released(model, tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def serve(pair):
    """Loads the release with its tables where it is told; what was opened is closed."""
    _, release, tables = pair
    opened = []

    def load(**how):
        opened.append(
            Qwen4ExpForCausalLM.from_pretrained(release, **{"tables": tables, "memory": "disk", **how}).eval()
        )
        return opened[-1]

    yield load
    for model in opened:
        stored_tables_of(model).close()


def assert_same(model, other, ids=None, **inputs) -> None:
    ids = random_ids() if ids is None else ids
    assert torch.equal(model(ids, **inputs).logits, other(ids, **inputs).logits)


@pytest.mark.parametrize("tier", TIERS)
@torch.no_grad()
def test_every_tier_gives_their_own_bits(pair, serve, tier):
    model, served = pair[0], serve(**TIERS[tier])
    for seed in range(3):
        assert_same(model, served, random_ids(seed=seed))
    how = {"max_new_tokens": 9, "do_sample": False, "num_beams": 3}
    assert torch.equal(served.generate(random_ids(), **how), model.generate(random_ids(), **how))
    assert stored_tables_of(served).counts.rows > 0


@pytest.mark.skipif(why_no_pool() is not None, reason=why_no_pool() or "")
@torch.no_grad()
def test_rows_of_other_machines_give_their_own_bits(pair, serve):
    opened = open_tables(pair[2])
    with LoopbackPool() as pool:
        server = PoolServer(address=pool.server.address)
        for layer, table in opened.tables.items():
            upload(table, f"qwen/{layer}", server, geometry=opened.geometry)

        def remote(table):
            shape = {"num_rows": table.num_rows, "row_bytes": table.row_bytes}
            return RemoteStore(f"qwen/{table.layer}", server, encoding="fp32", geometry=opened.geometry, **shape)

        served = serve(memory=remote, cache_rows=32)
        assert_same(pair[0], served)
        stored_tables_of(served).close()


@pytest.mark.parametrize("edges", [[0, 1, 23], [0, 13, 23], [0, 9, 10, 11, 12, 23], list(range(24))], ids=str)
@torch.no_grad()
def test_chunks_through_a_cache_equal_theirs(pair, serve, edges):
    model, served, ids = pair[0], serve(), random_ids()
    caches = [None, None]
    for begin, end in zip(edges, edges[1:]):
        found = [
            one(ids[:, begin:end], past_key_values=cache, use_cache=True) for one, cache in zip((model, served), caches)
        ]
        caches = [one.past_key_values for one in found]
        assert torch.equal(found[0].logits, found[1].logits)
        for layer in LAYERS:  # what the cache keeps is what theirs keeps, so that either could go on from it
            kept = [cache.get_conv_state(layer, state_idx=2) for cache in caches]
            assert torch.equal(*kept)
    swapped = [one(ids, past_key_values=cache).logits for one, cache in zip((served, model), caches)]
    assert torch.equal(*swapped)


GENERATING = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 4},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beams that sample": {"num_beams": 3, "do_sample": True},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"prefill_chunk_size": 5},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("mode", GENERATING)
@torch.no_grad()
def test_generate_writes_what_theirs_writes(pair, serve, mode):
    how = {"max_new_tokens": 17, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    written = []
    for model in (pair[0], serve()):
        torch.manual_seed(7)
        written.append(model.generate(random_ids(), **(how | GENERATING[mode])))
    assert torch.equal(written[0].sequences, written[1].sequences)
    assert all(map(torch.equal, written[0].logits, written[1].logits))


def test_speculation_is_refused_as_theirs_refuses_it(pair, serve):
    for model in (pair[0], serve()):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(random_ids(batch=1), prompt_lookup_num_tokens=3, max_new_tokens=5)


@torch.no_grad()
def test_padded_batches_one_token_prompts_and_embeddings_alone_are_as_theirs(pair, serve):
    model, served, ids = pair[0], serve(), random_ids()
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :1] = 0, 0
    assert_same(model, served, ids * mask, attention_mask=mask)
    how = {"max_new_tokens": 9, "do_sample": False}
    for one in ({}, {"num_beams": 3}):
        left = [m.generate(ids * mask, attention_mask=mask, **how, **one) for m in (model, served)]
        assert torch.equal(*left)
    assert torch.equal(*[m.generate(ids[:, :1], **how) for m in (model, served)])
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(*[m(inputs_embeds=embedded).logits for m in (model, served)])


@torch.no_grad()
def test_a_tensor_of_ids_may_be_changed_and_given_again(pair, serve):
    model, served, ids = pair[0], serve(), random_ids()
    assert_same(model, served, ids)
    ids[:, 4] = 11
    assert_same(model, served, ids)
    first = [m(ids, use_cache=True).past_key_values for m in (model, served)]
    assert torch.equal(*[m(ids, past_key_values=cache).logits for m, cache in zip((model, served), first)])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_trained_beside_a_frozen_table_gets_their_gradients(pair, serve, checkpointing):
    model, served, ids = copy.deepcopy(pair[0]), serve(), random_ids()
    for table in tables_in(model):
        table.requires_grad_(False)
    for one in (model, served):
        one.train()
        if checkpointing:
            one.activation_checkpointing_enable()
        one(ids, labels=ids, use_cache=False).loss.backward()
    gradients = [{name: p.grad for name, p in one.named_parameters() if p.grad is not None} for one in (model, served)]
    assert gradients[0].keys() == gradients[1].keys() and any(".ple.key_proj" in name for name in gradients[0])
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_their_tables_are_not_trained(serve, tmp_path):
    served = serve(memory="ram")
    with pytest.raises(ValueError, match="served, which cannot change them"):
        place_tables(served, where="ram")


def test_a_bf16_model_and_its_rows_in_bf16(tmp_path):
    model = their_model(torch.bfloat16)
    release, tables = released(model, tmp_path)
    assert open_tables(tables).encoding == "bf16"
    served = Qwen4ExpForCausalLM.from_pretrained(release, tables=tables, memory="disk", dtype=torch.bfloat16).eval()
    assert_same(model, served)
    wide = Qwen4ExpForCausalLM.from_pretrained(release, tables=tables, memory="disk", dtype=torch.float32).eval()
    assert_same(theirs.Qwen4ExpForCausalLM.from_pretrained(release, dtype=torch.float32).eval(), wide)
    for one in (served, wide):
        stored_tables_of(one).close()


@torch.no_grad()
def test_fp8_rows_are_scaled_where_transformers_alone_forgets_the_scale(tmp_path):
    model = their_model()
    release, tables = released(model, tmp_path, fp8=True)
    opened = open_tables(tables)
    assert opened.encoding == "fp8"
    for layer, table in zip(LAYERS, tables_in(model)):
        scale = opened.tables[layer].scale
        table.weight.copy_((table.weight / scale).to(torch.float8_e4m3fn).float() * scale)
    served = Qwen4ExpForCausalLM.from_pretrained(release, tables=tables, memory="disk").eval()
    assert_same(model, served)
    stored_tables_of(served).close()


@torch.no_grad()
def test_the_model_that_sees_is_served_too_and_as_one_that_does_not(tmp_path):
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16}
    torch.manual_seed(0)
    config = Qwen4ExpConfig(text_config=settings(), vision_config=vision, image_token_id=95, video_token_id=96)
    model = theirs.Qwen4ExpForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if ".ple." in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "release")
    import_tables(tmp_path / "release", tmp_path / "tables")
    ids = random_ids() % 90 + 1
    for kind in (Qwen4ExpForConditionalGeneration, Qwen4ExpForCausalLM):
        served, info = kind.from_pretrained(
            tmp_path / "release", tables=tmp_path / "tables", memory="disk", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_same(model, served.eval(), ids)
        assert torch.equal(*[m.generate(ids, max_new_tokens=5, do_sample=False) for m in (model, served)])
        stored_tables_of(served).close()


def test_loading_neither_reads_nor_allocates_the_tables(pair, serve, monkeypatch):
    read = []
    materialize = core_model_loading.spawn_materialize

    def note(pool, tensor, *args, **kwargs):
        read.append(tuple(tensor.get_shape()))
        return materialize(pool, tensor, *args, **kwargs)

    monkeypatch.setattr(core_model_loading, "spawn_materialize", note)
    shards = {shape for layer in LAYERS for shape in _shapes(pair[1], f"layers.{layer}.", ".shard_")}
    served = serve()
    assert read and not shards & set(read)
    rest = sum(p.numel() for p in pair[0].parameters()) - sum(t.weight.numel() for t in tables_in(pair[0]))
    assert sum(p.numel() for p in served.parameters()) == rest
    assert not [name for name in served.state_dict() if "ngram" in name or "memory" in name]
    theirs.Qwen4ExpForCausalLM.from_pretrained(pair[1])
    assert shards <= set(read)  # the spy sees what transformers' own class reads


def _shapes(folder: Path, *parts: str) -> set[tuple[int, ...]]:
    return {tuple(t.shape) for name, t in load_all(folder).items() if all(part in name for part in parts)}


@torch.no_grad()
def test_a_model_in_memory_gives_its_tables_up_once(pair):
    model, _, tables = pair
    live = copy.deepcopy(model)
    source = serve_released(live, tables, ServingSettings(where="disk", cache_rows=32))
    assert not [name for name, _ in live.named_parameters() if "ngram" in name]
    assert_same(model, live)
    with pytest.raises(ValueError, match="served already"):
        serve_released(live, tables, ServingSettings(where="ram"))
    with pytest.raises(ValueError, match="is not saved, since a copy would lack them"):
        live.save_pretrained(tables.parent / "copy")
    source.close()


def test_a_served_model_is_not_saved_without_its_tables(serve, tmp_path):
    with pytest.raises(ValueError, match="is not saved, since a copy would lack them"):
        serve().save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@torch.no_grad()
def test_a_copy_in_memory_reads_the_same_rows(pair, serve):
    served = serve(memory="ram")
    assert_same(pair[0], copy.deepcopy(served))


class Watched(RowStore):
    """Notes what is asked of it; loses the rows in `lost`."""

    def __init__(self, table, events, lost=()) -> None:
        self.store, self.layer, self.events, self.lost = RamStore(table), table.layer, events, lost
        self.name, self.num_rows, self.row_bytes = self.store.name, self.store.num_rows, self.store.row_bytes

    def _fetch(self, rows_U):
        self.events.append((self.layer, rows_U.tolist()))
        fetch, lost_U = self.store.fetch(rows_U), np.isin(rows_U, self.lost)

        class Late(Fetch):
            def wait(self, seconds=None):
                rows_US = fetch.wait(seconds)
                if lost_U.any():
                    raise RowsMissing("lost", lost_U, rows_US)
                return rows_US

        return Late()

    def close(self) -> None:
        self.store.close()


@torch.no_grad()
def test_reads_of_all_layers_start_before_the_first_block_and_ask_for_their_rows(pair, serve):
    model, ids, asked = pair[0], random_ids(), []
    hooks = [
        table.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].reshape(-1).tolist()))
        for table in tables_in(model)
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    events: list = []
    served = serve(memory=lambda table: Watched(table, events))
    served.model.layers[0].register_forward_hook(lambda *_: events.append("block 0"))
    served(ids)
    assert events == [(LAYERS[0], asked[0]), (LAYERS[1], asked[1]), "block 0"]


@torch.no_grad()
def test_a_lost_row_is_an_error_or_silences_its_position(pair, serve):
    model, ids = copy.deepcopy(pair[0]), random_ids(batch=1)
    tokens: list = []
    serve(memory=lambda table: Watched(table, tokens))(ids)
    lost = tokens[0][1][9 * 4 + 1]  # of the first table, a row of the tenth token
    positions = {place // 4 for place, row in enumerate(tokens[0][1]) if row == lost}
    where = {"memory": lambda table: Watched(table, [], [lost] if table.layer == LAYERS[0] else [])}
    with pytest.raises(RowsMissing):
        serve(**where)(ids)
    skipping = serve(**where, on_missing="skip", deadline=1.0)
    zeros = serve(**where, on_missing="zeros", deadline=1.0)

    def silence(_module, _inputs, embedding):
        embedding[0, sorted(positions)] = 0
        return embedding

    hook = model.model.layers[LAYERS[0]].ple.ple_embedding.register_forward_hook(silence)
    assert_same(model, skipping, ids)
    hook.remove()
    tables_in(model)[0].weight[lost] = 0
    assert_same(model, zeros, ids)
    assert stored_tables_of(zeros).counts.missing_rows == len(positions)


@torch.no_grad()
def test_one_changed_row_or_shuffled_rows_are_another_model(pair, tmp_path):
    """The controls: a comparison that cannot tell rows apart would pass above for any table."""
    model, _, tables = pair
    ids, asked = random_ids(), []
    hook = tables_in(model)[0].register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    model(ids)
    hook.remove()
    for name, change in (
        ("changed", lambda rows_RS: rows_RS[int(asked[0][0, 3, 0])].__setitem__(3, 0x42)),
        ("shuffled", lambda rows_RS: rows_RS.__setitem__(slice(None), np.random.default_rng(0).permutation(rows_RS))),
    ):
        folder = shutil.copytree(tables, tmp_path / name)
        table = open_tables(folder).tables[LAYERS[0]]
        shard = table.shards[0]
        rows_RS = np.memmap(shard.path, np.uint8, "r+", shard.start, (shard.num_rows, table.row_bytes))
        change(rows_RS)
        rows_RS.flush()
        live = copy.deepcopy(model)
        source = serve_released(live, folder, ServingSettings(where=lambda table: RamStore(table, verify=False)))
        assert not torch.equal(live(ids).logits, model(ids).logits), name
        source.close()
        live = copy.deepcopy(model)
        with pytest.raises(ValueError, match=rf"{shard.path.name} is damaged"):
            serve_released(live, folder, ServingSettings(where="ram"))
        assert_same(model, live, ids)  # it still has its own
        source = serve_released(live, folder, ServingSettings(where="disk"))
        with pytest.raises(RowsMissing, match=shard.path.name):  # the disk store compares checksums
            live(ids)
        source.close()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"vocab_size": 98}, "number of classes of ids: 97, and 98 in the model"),
        ({"eos_token_id": 7}, "class of missing history: 5, and 7 in the model"),
        ({"ple_layer_ids": [2, 3]}, r"memory layers: \[1, 4\], and \[1, 2\] in the model"),
        ({"ple_embed_dim": 32}, "width of a row: 7, and 8 in the model"),
        ({"ngram_vocab_size_base": 59}, "rows of each head: "),
        ({"seed": 4}, "multipliers of the hash: "),
        ({"make_ngram_vocab_size_divisible_by": 8}, "rows_multiple: 16, and 8 in the model"),
    ],
)
@torch.no_grad()
def test_tables_of_another_model_are_refused_by_what_differs(pair, tmp_path, changes, what):
    other = their_model(**changes)
    before = other(random_ids()).logits
    with pytest.raises(ValueError, match=what):
        serve_released(other, pair[2], ServingSettings(where="ram"))
    assert torch.equal(other(random_ids()).logits, before)  # it still has its own
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=what):
        Qwen4ExpForCausalLM.from_pretrained(tmp_path, tables=pair[2], memory="ram")


def test_other_models_and_wrong_settings_are_refused(pair, serve, tmp_path):
    with pytest.raises(ValueError, match="is no Qwen4-Exp model"):
        serve_released(tiny_model("paper"), pair[2], ServingSettings(where="ram"))
    with pytest.raises(ValueError, match="has no ple_layer_ids"):
        serve_released(their_model(ple_layer_ids=[]), pair[2], ServingSettings(where="ram"))
    with pytest.raises(ValueError, match="memory is 'tape'; allowed"):
        serve(memory="tape")
    with pytest.raises(ValueError, match="built without the rows of its tables"):
        Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**settings()))(random_ids())
    resized = their_model()
    resized.model.layers[1].ple.ple_embedding.layer_multipliers += 2
    with pytest.raises(ValueError, match="not the one that its n-gram tables were built with"):
        serve_released(resized, pair[2], ServingSettings(where="ram"))


@torch.no_grad()
def test_memory_off_equals_rows_of_zeros(pair, serve):
    model, served, ids = pair[0], serve(), random_ids()
    zeroed = copy.deepcopy(model)
    for table in tables_in(zeroed):
        table.weight.zero_()
    how = {"max_new_tokens": 9, "do_sample": False}
    for one in (model, served):  # with its tables in memory, and served
        assert not torch.equal(one(ids).logits, zeroed(ids).logits)
        with memory_off(one):
            assert_same(zeroed, one, ids)
            assert torch.equal(zeroed.generate(ids, **how), one.generate(ids, **how))
        assert_same(model, one, ids)


@torch.no_grad()
def test_shrunken_rows_are_the_rounded_table_and_cost_what_the_encoding_says(pair, tmp_path):
    model, _, tables = pair
    errors = {}
    for encoding in ("bf16", "int8", "fp8_row"):
        made = quantize(tables, tmp_path / encoding, encoding=encoding)
        served = copy.deepcopy(model)
        source = serve_released(served, made.tables.path, ServingSettings(where="disk"))
        rounded = copy.deepcopy(model)
        for layer, table in zip(LAYERS, tables_in(rounded)):
            rows = torch.arange(table.num_embeddings // 4 * 4).view(1, -1, 4)
            wait = source.read([{made.tables.tables[layer].name: rows}])[0][made.tables.tables[layer].name]
            table.weight.copy_(wait().embedding.view(-1, table.embedding_dim))
        assert_same(rounded, served)
        errors[encoding] = float((served(random_ids()).logits - model(random_ids()).logits).norm())
        assert all(error.relative < 0.04 for error in made.errors.values())
        source.close()
    assert 0 < errors["bf16"] < errors["int8"] < errors["fp8_row"]


@torch.no_grad()
def test_batches_are_not_read_ahead_for_a_model_that_takes_no_rows(pair, serve):
    served = serve()
    batches = [{"input_ids": random_ids(seed=seed)} for seed in range(3)]
    assert [list(batch) for batch in look_ahead(served, batches)] == [["input_ids"]] * 3


@torch.no_grad()
def test_files_of_the_table_alone_may_be_deleted(pair, tmp_path):
    """Once the index names them no more."""
    folder, tensors = tmp_path / "release", load_all(pair[1])
    rest = {name: tensor for name, tensor in tensors.items() if ".shard_" not in name}
    save_split(rest, folder, 2)
    shutil.copy(pair[1] / "config.json", folder)
    served = Qwen4ExpForCausalLM.from_pretrained(folder, tables=pair[2], memory="disk").eval()
    assert_same(pair[0], served)
    stored_tables_of(served).close()


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_gives_their_bits(pair, serve):
    torch._dynamo.reset()
    served = torch.compile(serve(), backend="eager")
    for seed in range(2):
        assert_same(pair[0], served, random_ids(seed=seed))


def test_an_adapter_is_trained_and_saved_without_the_tables(pair, serve, tmp_path):
    served = serve()
    served.add_adapter(LoraConfig(target_modules=["key_proj", "down_proj"]))
    served(random_ids(), labels=random_ids()).loss.backward()
    assert all("lora" in name for name, p in served.named_parameters() if p.grad is not None)
    served.save_pretrained(tmp_path)
    assert all("lora" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert not (tmp_path / "model.safetensors").exists()
