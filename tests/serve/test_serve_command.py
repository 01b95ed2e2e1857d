"""`engrammar serve` as a user starts it: a base with an attached memory and a patch, in a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attached_models import memory_config, randomize
from base_folder import write_base
from engrammar import attach, load_attached, save_attached
from engrammar.edit import ExactEntry, apply_patch, base_of, build_patch, subject_keys, write_patch
from engrammar.serve.openai.loading import load_served
from engrammar.vocabulary import compress_vocabulary

NEW, TEXT = 8, "Entry 5 says that"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, an adapter of it, and a patch of it."""
    place = tmp_path_factory.mktemp("command")
    base, adapter, path = write_base(place / "base"), place / "adapter", place / "patch.safetensors"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    keys = subject_keys("that", tokenizer, compress_vocabulary(tokenizer))
    value = torch.randn(1, 32, generator=torch.Generator().manual_seed(1)) * 9
    entries = [ExactEntry(key=key, block=2, values=value) for key in keys]
    write_patch(build_patch("entry", base_of(model, tokenizer), entries), path)
    attach(model, memory_config(), tokenizer)
    randomize(model)
    save_attached(model, adapter)
    return base, adapter, path


@torch.no_grad()
def generated(folders, *, patched: bool = True) -> list[int]:
    base, adapter, path = folders
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    load_attached(model, adapter, tokenizer)
    if patched:
        apply_patch(model, path, tokenizer)
    model.generation_config.eos_token_id = None
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    return model.eval().generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.mark.slow
def test_the_command_serves_a_base_with_an_adapter_and_a_patch(folders):
    base, adapter, path = folders
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "engrammar_cli.main", "serve", str(base), "--port", str(port)]
    command += ["--memory", "disk", "--adapter", str(adapter), "--patch", str(path), "--served-name", "tiny"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        extra = {"ignore_eos": True, "return_token_ids": True}
        asked = {"prompt": TEXT, "max_tokens": NEW, "temperature": 0, "extra_body": extra}
        answer = client.completions.create(model="tiny", **asked).choices[0]
        assert answer.token_ids == generated(folders) != generated(folders, patched=False)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, process.stderr.read()


def wait_for(url: str, process: subprocess.Popen) -> None:
    while True:
        assert process.poll() is None, process.stderr.read()
        try:
            with urllib.request.urlopen(url):
                return
        except urllib.error.URLError:
            time.sleep(0.2)


def test_a_memory_is_not_looked_for_in_a_plain_model(folders):
    base, _, path = folders
    assert load_served(str(base), patches=[path], memory="ram")[0].config.model_type == "llama"
    with pytest.raises(ValueError, match="has no memory"):
        load_served(str(base), memory="disk")
    with pytest.raises(ValueError, match="device is 'npu:0'; allowed: cpu"):
        load_served(str(base), device="npu:0")
