"""A model on a device reads the rows and gives the logits that it gives on the CPU, in every way of decoding.

ENGRAMMAR_DEVICE names the device: "imitated" is one for machines without an accelerator; `make gpu` takes a real one.
"""

import asyncio
import copy
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from attached_models import PAD, attached_model
from edited_models import OURS, edited_model, model_of_kind, spoken_ids, tokenizer
from engrammar import EngrammarForCausalLM
from engrammar.config import DIALECTS, Encoding
from engrammar.edit import apply_patch, undo_patch
from engrammar.edit.applying import edits_of
from engrammar.serve.openai.asked import Asked, Limits
from engrammar.serve.openai.engine import Engine
from engrammar.stores.serving import look_ahead, stored_tables_of
from engrammar.stores.to_device import DeviceCopies
from engrammar.tables.convert import quantize
from engrammar.train.placement import place_tables
from models import VOCABULARY, tiny_model
from named_device import DEVICE

cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA: make gpu")
EXACT = {"rtol": 0.0, "atol": 1e-5}  # two ways on one device
NEAR = {"rtol": 0.0, "atol": 1e-4}  # two devices, which round otherwise
TIERS = {
    "RAM": {"memory": "ram"},
    "disk": {"memory": "disk"},
    "cache over disk": {"memory": "disk", "cache_rows": 64},
}
NEW = 9


def some_ids(batch: int = 2, length: int = 13, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor, **given) -> Tensor:
    return model(input_ids=ids.to(DEVICE), use_cache=False, **given).logits.cpu()


@pytest.fixture(scope="module", params=DIALECTS)
def pair(request):
    """A model on the CPU, and its copy on the device."""
    model = tiny_model(request.param, 1 if request.param == "qwen_next" else 2)
    return model, copy.deepcopy(model).to(DEVICE)


def test_addresses_are_the_cpus_to_the_bit(pair):
    here, there = pair
    for seed in range(5):
        ids = some_ids(3, 57, seed)
        mask = torch.ones_like(ids)
        mask[1, :20] = 0
        expected = here.model.memory.addresses(ids, mask)
        for layer, rows in there.model.memory.addresses(ids.to(DEVICE), mask.to(DEVICE)).items():
            assert torch.equal(rows.cpu(), expected[layer])


@torch.no_grad()
def test_logits_are_the_cpus(pair):
    here, there = pair
    torch.testing.assert_close(logits_of(there, some_ids()), here(some_ids(), use_cache=False).logits, **NEAR)


@pytest.mark.parametrize("sizes", [[1] * 17, [7, 1, 1, 5, 3]], ids=["tokens", "chunks"])
@torch.no_grad()
def test_any_split_equals_whole(pair, sizes):
    _, model = pair
    ids, cache = some_ids(2, 17).to(DEVICE), DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1).cpu(), logits_of(model, ids), **EXACT)


@pytest.mark.parametrize("encoding", ["bf16", "int8", "fp8_row"])
@pytest.mark.parametrize("tier", TIERS)
@torch.no_grad()
def test_rows_from_the_host_arrive_to_the_bit(tier, encoding: Encoding, tmp_path):
    tiny_model("paper").save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "changed", encoding=encoding)
    here = EngrammarForCausalLM.from_pretrained(tmp_path / "changed", **TIERS[tier]).eval()
    there = EngrammarForCausalLM.from_pretrained(tmp_path / "changed", **TIERS[tier]).eval().to(DEVICE)
    for seed in range(3):
        expected, found = here.retrieve(some_ids(seed=seed)), there.retrieve(some_ids(seed=seed).to(DEVICE))
        for layer in expected.waits:
            rows, more = expected.wait(layer)[0], found.wait(layer)[0]
            assert more.device.type == DEVICE.type and torch.equal(more.cpu(), rows)
    assert len(stored_tables_of(there).copies) == 1
    for model in (here, there):
        stored_tables_of(model).close()


@torch.no_grad()
def test_batches_that_are_read_ahead_give_the_same_logits(tmp_path):
    model = tiny_model("paper")
    model.save_pretrained(tmp_path)
    served, model = EngrammarForCausalLM.from_pretrained(tmp_path, memory="disk").eval().to(DEVICE), model.to(DEVICE)
    batches = [{"input_ids": some_ids(4, 64, seed).to(DEVICE)} for seed in range(8)]
    found = [served(**batch, use_cache=False).logits for batch in look_ahead(served, batches)]
    for batch, logits in zip(batches, found, strict=True):
        assert torch.equal(logits, model(**batch, use_cache=False).logits)
    stored_tables_of(served).close()


def decode(model: nn.Module, device: torch.device = DEVICE, **settings) -> tuple[Tensor, Tensor]:
    """New tokens and their logits for two prompts, one of them padded on the left."""
    ids = spoken_ids(2, 11)
    ids[1, :7] = PAD
    out = model.generate(
        ids.to(device), attention_mask=(ids != PAD).long().to(device), max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False, pad_token_id=PAD, eos_token_id=None, return_dict_in_generate=True, output_logits=True,
        **settings,
    )  # fmt: skip
    return out.sequences.cpu(), torch.stack(out.logits).cpu()


@pytest.mark.parametrize("make", [attached_model, edited_model], ids=["attached", "patched"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_decoding_is_the_cpus_and_a_static_cache_changes_nothing(make, family):
    """With a static cache transformers compiles the pass on an accelerator, and records CUDA graphs."""
    check_decoding(make(family), make(family).to(DEVICE))


@pytest.mark.parametrize("how", [{}, *TIERS.values()], ids=["parameters", *TIERS])
def test_decoding_of_our_model_is_the_cpus_and_a_static_cache_changes_nothing(how, tmp_path):
    model = model_of_kind(OURS)
    model.save_pretrained(tmp_path)
    served = EngrammarForCausalLM.from_pretrained(tmp_path, **how)
    check_decoding(model, served.eval().to(DEVICE))


def check_decoding(here: nn.Module, there: nn.Module) -> None:
    """Compares a model on the device with one on the CPU: a cache that grows, then twice a static one."""
    expected = decode(here, torch.device("cpu"))
    for settings in ({}, {"cache_implementation": "static"}, {"cache_implementation": "static"}):
        ids, logits = decode(there, **settings)
        assert torch.equal(ids, expected[0])
        torch.testing.assert_close(logits, expected[1], **NEAR)


def test_our_server_gives_the_tokens_of_generate(tmp_path):
    model_of_kind(OURS).save_pretrained(tmp_path)
    model = EngrammarForCausalLM.from_pretrained(tmp_path, memory="disk").eval().to(DEVICE)
    prompts = spoken_ids(5, 40)
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    expected = model.generate(prompts.to(DEVICE), attention_mask=torch.ones_like(prompts).to(DEVICE), **how)[:, 40:]

    async def answers() -> list[list[int]]:
        engine = Engine(model, None, Limits(max_length=80, cache_tokens=512, batch_tokens=32))
        asked = Asked(prompts=prompts.tolist(), max_tokens=NEW, temperature=0.0, ignore_eos=True)

        async def one(ids: list[int]) -> list[int]:
            async with aclosing(engine.tokens(ids, asked, None, [])) as tokens:
                return [token async for new in tokens for token in new]

        try:
            async with engine.turn():
                return await asyncio.gather(*map(one, asked.prompts))
        finally:
            engine.close()

    assert asyncio.run(answers()) == expected.tolist()
    stored_tables_of(model).close()


def test_a_patch_that_comes_after_recording_is_seen():
    model = edited_model("llama").to(DEVICE)
    edits = edits_of(model)
    patch, static = edits.applied[0].whole(), {"cache_implementation": "static"}
    patched = decode(model, **static)[1]
    undo_patch(model)
    plain = decode(model, **static)[1]
    assert float((plain - patched).abs().max()) > 1e-2
    torch.testing.assert_close(plain, decode(model)[1], **EXACT)
    apply_patch(model, patch, tokenizer())
    torch.testing.assert_close(decode(model, **static)[1], patched, **EXACT)


@pytest.mark.parametrize("where", ["device", "ram", "file"])
def test_a_step_of_training_is_the_cpus(where, tmp_path):
    def trained(device: torch.device, folder: Path) -> tuple[float, dict[str, Tensor]]:
        model = tiny_model("paper", 2).train().to(device)
        placed = place_tables(model, where=where, folder=folder)
        ids = some_ids(4, 31).to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        placed.collect()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        grads |= {name: table.grad for name, table in placed.tables.items()}
        return loss.item(), {name: grad.to_dense().cpu() for name, grad in grads.items()}

    loss, expected = trained(torch.device("cpu"), tmp_path / "here")
    found_loss, found = trained(DEVICE, tmp_path / "there")
    assert found.keys() == expected.keys() and abs(loss - found_loss) < 1e-4
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], **NEAR)


@cuda
@torch.no_grad()
def test_a_copy_that_nobody_waits_for_is_read_too_early(monkeypatch, tmp_path):
    """The control of all of this: without the event, the block reads what has not arrived."""
    model = tiny_model("paper")
    model.save_pretrained(tmp_path)
    served = EngrammarForCausalLM.from_pretrained(tmp_path, memory="ram").eval().to(DEVICE)
    expected = logits_of(served, some_ids())
    copy_rows = DeviceCopies._copy

    def late(copies: DeviceCopies, wait, make):
        with copies.stream:
            torch.cuda._sleep(500_000_000)
        return copy_rows(copies, wait, make)

    monkeypatch.setattr(DeviceCopies, "_copy", late)
    assert torch.equal(logits_of(served, some_ids()), expected)
    monkeypatch.setattr(DeviceCopies, "_read", lambda copies, copying: copying.result()[0])
    assert not torch.equal(logits_of(served, some_ids()), expected)
    stored_tables_of(served).close()


@torch.no_grad()
def test_ids_leave_the_device_once_a_step(tmp_path):
    tiny_model("paper", first_k_dense_replace=4).save_pretrained(tmp_path)  # experts send counts to the host
    served = EngrammarForCausalLM.from_pretrained(tmp_path, memory="ram").eval().to(DEVICE)
    cache, ids = DynamicCache(config=served.config), some_ids(2, 17).to(DEVICE)
    served(ids[:, :15], past_key_values=cache, use_cache=True)
    with to_host() as count:
        for last in (16, 17):
            served(ids[:, last - 1 : last], past_key_values=cache, use_cache=True)
    assert count() == 2
    stored_tables_of(served).close()


@contextmanager
def to_host() -> Iterator[Callable[[], int]]:
    """Counts what is sent to the host."""
    if DEVICE.type == "cuda":
        with torch.profiler.profile() as seen:
            yield lambda: sum("Memcpy DtoH" in event.name for event in seen.events())
    else:
        from imitated_device import transfers

        before = transfers.tensors + transfers.numbers
        yield lambda: transfers.tensors + transfers.numbers - before
