"""What lies below a memory is computed once, and training goes on from there with the same numbers."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from attached_models import END, FAMILIES, attached_model, base_model, memory_config, random_ids, randomize, tokenizer
from engrammar.attach import attach, detach, keep_prefix, set_trainable
from engrammar.attach.attaching import attachment_of
from engrammar.attach.blocks import find_decoder
from engrammar.attach.prefix import HIDDEN
from engrammar.attach.skipping import KEPT, KEPT_BLOCK
from engrammar.train.trainer import EngrammarTrainer

LAYERS = {"layers": (2, 3)}


class Blocks:
    """Items of 12 tokens each."""

    def __init__(self, num_items: int = 6, seed: int = 3) -> None:
        self.ids = random_ids(num_items, 12, seed)
        self.ids[0, 5] = END

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index].clone()}


def batch_of(items) -> dict:
    return torch.utils.data.default_collate([items[index] for index in range(len(items))])


def counted(model: nn.Module) -> dict[int, int]:
    """How often each block's own code has run."""
    calls: dict[int, int] = {}
    for index, block in enumerate(find_decoder(model).blocks):
        inner = next(child for child in block.modules() if "Norm" in type(child).__name__)
        inner.register_forward_hook(lambda *_, index=index: calls.update({index: calls.get(index, 0) + 1}))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_a_whole_pass_and_the_lower_blocks_do_not_run(family, tmp_path):
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    model, items = attached_model(family, LAYERS, **settings), Blocks()
    kept = keep_prefix(model, items, tmp_path / "kept", batch_size=len(items))
    found, calls = [], counted(model)
    for batch in (batch_of(items), batch_of(kept)):
        model.zero_grad()
        calls.clear()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        grads = {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
        assert set(calls) == ({2, 3} if KEPT in batch else {0, 1, 2, 3})
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert set(found[0][1]) == {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        wrong = batch_of(kept) | {KEPT: batch_of(kept)[KEPT].flip(0)}
        assert abs(model(**wrong).loss - found[0][0]) > 1e-3  # the kept numbers are what is read


def test_a_folder_is_used_again_and_another_text_or_base_is_refused(tmp_path, monkeypatch):
    model, items, folder = attached_model("llama", LAYERS), Blocks(), tmp_path / "kept"
    first = keep_prefix(model, items, folder)
    written = (folder / HIDDEN).stat().st_mtime_ns
    again = keep_prefix(attached_model("llama", LAYERS), items, folder)
    assert (folder / HIDDEN).stat().st_mtime_ns == written
    assert torch.equal(pickle.loads(pickle.dumps(again))[3][KEPT], first[3][KEPT])
    with pytest.raises(ValueError, match="of another text: delete it"):
        keep_prefix(model, Blocks(seed=4), folder)
    with pytest.raises(ValueError, match="of another layer, weights: delete it"):
        keep_prefix(attached_model("llama", {"layers": (3,)}), items, folder)
    with torch.no_grad():
        find_decoder(model).blocks[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="of another weights"):
        keep_prefix(model, items, folder)


def test_a_damaged_folder_is_refused(tmp_path):
    model, items, folder = attached_model("llama", LAYERS), Blocks(), tmp_path / "kept"
    keep_prefix(model, items, folder)
    whole = (folder / HIDDEN).read_bytes()
    (folder / HIDDEN).write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="that is not whole"):
        keep_prefix(model, items, folder)
    (folder / HIDDEN).write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match="or the folder is damaged"):
        keep_prefix(model, items, folder)
    (folder / "prefix.json").write_text("{")
    with pytest.raises(ValueError, match="holds no kept prefix"):
        keep_prefix(model, items, folder)


def test_what_would_change_below_the_memory_is_refused(tmp_path):
    model, items = attached_model("llama", LAYERS), Blocks()
    with pytest.raises(ValueError, match="nothing lies below"):
        keep_prefix(attached_model("llama", {"layers": (0, 2)}), items, tmp_path / "none")
    kept = keep_prefix(model, items, tmp_path / "kept")
    set_trainable(model, "joint")
    for call in (lambda: model(**batch_of(kept)), lambda: keep_prefix(model, items, tmp_path / "joint")):
        with pytest.raises(ValueError, match=r"embed_tokens.weight is trained, and it lies below .*block 2"):
            call()
    set_trainable(model, "memory")
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**batch_of(kept), use_cache=True)
    with pytest.raises(ValueError, match="pass it with the input_ids"):
        model(**batch_of(kept) | {"input_ids": items.ids[:3]})
    torch.testing.assert_close(model(**batch_of(items)).loss, model(**batch_of(kept)).loss)  # nothing is left behind


def test_what_another_block_reads_is_refused(tmp_path):
    model, items = attached_model("llama", LAYERS), Blocks()
    batch = batch_of(keep_prefix(model, items, tmp_path / "kept"))
    attach(model, memory_config(layers=(1,)), tokenizer(), name="lower")
    with pytest.raises(ValueError, match="what block 2 reads, and the first memory is at block 1"):
        model(**batch)
    detach(model, "lower")
    torch.testing.assert_close(model(**batch).loss, model(**batch_of(items)).loss)
    with pytest.raises(ValueError, match="pass kept_block beside it"):
        model(**{name: value for name, value in batch.items() if name != KEPT_BLOCK})


def test_embeddings_of_positions_lie_below_the_memory(tmp_path):
    model = attached_model("gpt2", LAYERS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.transformer.wpe.requires_grad_(True)
    with pytest.raises(ValueError, match=r"transformer.wpe.weight is trained, and it lies below"):
        keep_prefix(model, Blocks(), tmp_path / "kept")
    set_trainable(model, "memory")
    model.transformer.ln_f.requires_grad_(True)  # this one lies above
    keep_prefix(model, Blocks(), tmp_path / "kept")
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] += 1
    with pytest.raises(ValueError, match="of another weights"):
        keep_prefix(model, Blocks(), tmp_path / "kept")


def test_an_interrupted_pass_leaves_nothing_behind(tmp_path):
    """torch does not call hooks after a KeyboardInterrupt."""
    model, items = attached_model("llama", LAYERS), Blocks()
    batch, whole = batch_of(keep_prefix(model, items, tmp_path / "kept")), model(**batch_of(items)).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.model.layers[3].register_forward_pre_hook(interrupt):
        model(**{**batch, KEPT: batch[KEPT] + 1})
    assert torch.equal(model(**batch_of(items)).logits, whole)


def test_blocks_are_skipped_in_the_thread_of_the_pass_alone(tmp_path):
    model, items, other = attached_model("llama", LAYERS), Blocks(), []
    batch, whole = batch_of(keep_prefix(model, items, tmp_path / "kept")), model(**batch_of(items)).logits

    def meanwhile(*_):
        if not other:
            other.append(None)
            with ThreadPoolExecutor(1) as pool:
                other.append(pool.submit(lambda: model(**batch_of(items)).logits).result())

    with model.model.layers[3].register_forward_pre_hook(meanwhile):
        kept = model(**{**batch, KEPT: batch[KEPT] + 1}).logits
    assert torch.equal(other[1], whole)
    assert not torch.allclose(kept, whole, atol=1e-3)
    assert torch.equal(copy.deepcopy(model)(**batch_of(items)).logits, whole)


def test_dropout_below_the_memory_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"In training the blocks below 2 compute something else \(dropout"):
        keep_prefix(attached_model("gpt2", LAYERS, resid_pdrop=0.5), Blocks(), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_items_of_several_lengths_are_refused(tmp_path):
    items = [{"input_ids": random_ids(1, length)[0]} for length in (3, 4)]
    with pytest.raises(ValueError, match="2 lengths; allowed: blocks of one length"):
        keep_prefix(attached_model("llama", LAYERS), items, tmp_path / "kept")


def test_a_base_in_bf16_keeps_its_own_precision(tmp_path):
    model = base_model("llama").to(torch.bfloat16)
    randomize(attach(model, memory_config(**LAYERS), tokenizer()))
    kept = keep_prefix(model, Blocks(), tmp_path / "kept")
    assert kept[0][KEPT].dtype == torch.bfloat16
    assert json.loads((tmp_path / "kept" / "prefix.json").read_text())["dtype"] == "bfloat16"
    torch.testing.assert_close(model(**batch_of(kept)).loss, model(**batch_of(Blocks())).loss, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_trains_on_a_kept_prefix(checkpointing, tmp_path):
    """The same steps as on whole passes."""
    losses = []
    for keeps in (False, True):
        model = base_model("llama")
        attach(model, memory_config(**LAYERS), tokenizer())
        before = {name: p.clone() for name, p in model.named_parameters() if "engrammar" not in name}
        items = keep_prefix(model, Blocks(), tmp_path / "kept", batch_size=3) if keeps else Blocks()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / f"run{keeps}"), max_steps=8, learning_rate=0.05, per_device_train_batch_size=3,
            logging_steps=1, report_to="none", save_strategy="no", remove_unused_columns=False, use_cpu=True,
            activation_checkpointing=checkpointing, disable_tqdm=True,
        )  # fmt: skip
        trainer = EngrammarTrainer(model, arguments, train_dataset=items)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        after = {name: p for name, p in model.named_parameters() if "engrammar" not in name}
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert attachment_of(model) is not None
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.01
