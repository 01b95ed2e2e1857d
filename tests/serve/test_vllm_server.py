"""What docs/serving-vllm.md tells a reader to start: vLLM's server, in processes of its own, compiled or not."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-serve` makes an environment with it")

from engrammar import EngrammarForCausalLM
from engrammar.edit import ExactEntry, apply_patch, base_of, build_patch, write_patch
from engrammar.vocabulary import compress_vocabulary
from models import save_micro

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
NEW = 12
TEXTS = ["To be", "that is the question", "or not to be, that is", "question: to be"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("server") / "model"
    folder.mkdir()
    save_micro(folder)
    model = EngrammarForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    for block in model.model.layers:
        if block.fusion is not None:
            torch.nn.init.normal_(block.fusion.conv_weight)
    tables = {name: table.weight for name, table in model.model.memory.tables.items()}
    for weight in tables.values():
        torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def complete(port: int, text: str, **extra) -> list[int]:
    body = {"model": "served", "prompt": text, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, **extra}
    body["return_token_ids"] = True  # vLLM leaves out the last token's bytes if they are half a letter
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def wait_until_it_answers(server: subprocess.Popen, port: int, log: Path) -> None:
    while True:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)


def start(folder: Path, port: int, log: Path, *arguments: str, **more) -> subprocess.Popen:
    settings = {"engrammar": {"memory": "disk", "cache_rows": 50, **more}}
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
            *("--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "float32", "--max-model-len", "128"),
            *("--additional-config", json.dumps(settings), *arguments),
        ],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", **environment},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.parametrize("arguments", [("--enforce-eager",), ()], ids=["eager", "compiled"])
def test_the_server_answers_as_generate_does(folder, tmp_path, arguments):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), EngrammarForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    expected = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        expected.append(out[0, ids.shape[1] :].tolist())
    port, log = free_port(), tmp_path / "log.txt"
    server = start(folder, port, log, *arguments)
    try:
        wait_until_it_answers(server, port, log)
        with ThreadPoolExecutor(4) as pool:
            answers = [*pool.map(lambda text: complete(port, text), TEXTS * 2)]
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    assert answers == expected * 2
    assert "engrammar's self-test: logits differ from transformers' by" in log.read_text()


def test_requests_name_patches(folder, tmp_path):
    """The process that takes requests knows the patches that the one that runs the model offers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), EngrammarForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    ids = tokenizer(TEXTS[2], return_tensors="pt").input_ids
    value = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(1)) * 9
    entry = ExactEntry(key=(int(compress_vocabulary(tokenizer)[ids[0, -1]]),), block=1, values=value)
    patch = build_patch("facts", base_of(model, tokenizer), [entry])
    write_patch(patch, tmp_path / "facts.safetensors")
    expected = []
    for _ in range(2):
        expected.append(model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist())
        if len(expected) == 1:
            apply_patch(model, patch, tokenizer)
    port, log, named = free_port(), tmp_path / "log.txt", {"vllm_xargs": {"patches": ["facts"]}}
    arguments = ("--enforce-eager", "--no-enable-prefix-caching")
    server = start(folder, port, log, *arguments, patches_on_request=[str(tmp_path / "facts.safetensors")])
    try:
        wait_until_it_answers(server, port, log)
        with ThreadPoolExecutor(4) as pool:
            answers = [*pool.map(lambda extra: complete(port, TEXTS[2], **extra), [{}, named] * 2)]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            complete(port, TEXTS[2], vllm_xargs={"patches": ["none"]})
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    assert answers == expected * 2 and expected[0] != expected[1]
