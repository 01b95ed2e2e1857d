"""The folder that `engrammar vllm` writes: links, and a config that only our plug-in's vLLM takes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from attached_models import attached_model, base_model, memory_config, random_ids, tokenizer
from engrammar import load_attached
from engrammar.attach import attach, save_attached
from engrammar.serve.folder import DENSE, EXPERTS, KEY, adapter_of, link_folder
from engrammar_cli.main import main
from image_models import image_model


def saved(folder, family):
    model = attached_model(family)
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    save_attached(model, folder / "adapter")
    return model


@torch.no_grad()
@pytest.mark.parametrize(("family", "architecture"), [("llama", DENSE), ("qwen3_moe", EXPERTS), ("mixtral", EXPERTS)])
def test_the_folder_holds_links_and_the_same_model(tmp_path, capsys, family, architecture):
    model, out = saved(tmp_path, family), tmp_path / "new" / "vllm"
    main(["vllm", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--out", str(out)])
    assert str(out) in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [architecture] and config[KEY]["memory"]["layers"] == [1, 2]
    assert [path.name for path in out.iterdir() if not path.is_symlink()] == ["config.json"]
    assert (out / "model.safetensors").samefile(tmp_path / "base" / "model.safetensors")
    assert (out / "tokenizer.json").is_file()
    found = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    load_attached(found, adapter_of(out, found.config), tokenizer())
    ids = random_ids(2, 9)
    assert torch.equal(found(ids).logits, model(ids).logits)


def test_what_cannot_be_served_is_refused_in_one_sentence(tmp_path):
    saved(tmp_path, "llama")
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "vllm"
    other = base_model("llama", hidden_size=64)
    other.save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="hidden_size"):
        link_folder(str(tmp_path / "other"), adapter, out)
    assert not out.exists()
    link_folder(str(base), adapter, out)
    with pytest.raises(ValueError, match="is there already"):
        link_folder(str(base), adapter, out)
    adapter.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads nowhere: write the folder again"):
        adapter_of(out, None)


def test_a_base_that_reads_images_is_refused(tmp_path):
    model = attach(image_model("llava"), memory_config(), tokenizer())
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    save_attached(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="reads more than text"):
        link_folder(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "vllm")
    assert not (tmp_path / "vllm").exists()
