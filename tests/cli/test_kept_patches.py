"""A patch that is kept in a model's folder is there for every command that opens the folder."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from base_folder import write_base
from engrammar.edit import ExactEntry, applied_patches, apply_patch, base_of, build_patch, keep_patch, subject_keys
from engrammar.serve.openai import server as module
from engrammar.train.sample import load_changed
from engrammar.vocabulary import compress_vocabulary
from engrammar_cli.main import main
from engrammar_explore.opening import Source, open_session
from engrammar_lab.harness import load_model

TEXT = "Entry 5 says that"


@pytest.fixture
def folder(tmp_path) -> Path:
    base = write_base(tmp_path / "base")
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    keys = subject_keys("that", tokenizer, compress_vocabulary(tokenizer))
    value = torch.randn(1, 32, generator=torch.Generator().manual_seed(1)) * 9
    entries = [ExactEntry(key=key, block=2, values=value) for key in keys]
    keep_patch(build_patch("kept", base_of(model, tokenizer), entries), base)
    return base


def generate(folder, monkeypatch):
    return load_changed(str(folder), adapter=None, patch=None, tables=None)[0]


def serve(folder, monkeypatch):
    served = []
    monkeypatch.setattr(module, "run", lambda server, host, port: served.append(server.engine))
    main(["serve", str(folder)])
    (engine,) = served
    engine.close()
    return engine.model


def explore(folder, monkeypatch):
    session = open_session(Source(model=str(folder)))
    assert [one["applied"] for one in session.about()["patches"]] == [True]
    return session.explored.model


def evaluate(folder, monkeypatch):
    return load_model(folder)[0]


@pytest.mark.parametrize("command", [generate, serve, explore, evaluate])
@torch.no_grad()
def test_a_kept_patch_is_applied(command, folder, monkeypatch):
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    before = plain(ids, use_cache=False).logits
    (path,) = (folder / "engrammar_patches").iterdir()
    expected = apply_patch(plain, path, tokenizer)(ids, use_cache=False).logits
    model = command(folder, monkeypatch)
    assert applied_patches(model) == ["kept"]
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-2)
