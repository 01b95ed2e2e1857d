"""vLLM in bf16, as most bases are stored: what differs from transformers is rounding. And a real base, in both dtypes.

Where tokens part, transformers' model must have found both equally good; up to there their log-probabilities are equal.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-serve` makes an environment with it")
from test_vllm import HEADS
from test_vllm import save as save_own
from test_vllm_attached import save as save_attached_model
from test_vllm_patched import PLAIN, make
from test_vllm_patched import asked as asked_of_patched

from attached_models import END, VOCABULARY, tokenizer
from engrammar import EngrammarForCausalLM, MemoryConfig
from engrammar.attach import attach, disabled, load_attached, save_attached
from engrammar.attach.attaching import attachment_of
from engrammar.edit import apply_patch
from engrammar.serve.folder import link_folder
from vllm_engines import (
    BLOCK,
    answers_of,
    count,
    engine,
    forget_history,
    forget_windows,
    num_equal,
    prompts,
    served,
)

pytestmark = pytest.mark.vllm
CLOSE = {"float32": 1e-4, "bfloat16": 0.5}  # in log-probabilities of SmolLM2; bf16 has steps of 0.125 from 16 to 32


@torch.no_grad()
def check_up_to_rounding(model, asked, found, expected, *, close: float, tie: float) -> int:
    """Returns how many answers are equal."""
    equal = 0
    for prompt, one, other in zip(asked, found, expected, strict=True):
        same = next((n for n, pair in enumerate(zip(one.tokens, other.tokens)) if len({*pair}) > 1), len(one.tokens))
        torch.testing.assert_close(one.logprobs[:same], other.logprobs[:same], atol=close, rtol=0)
        equal += same == len(one.tokens)
        if same < len(one.tokens):
            scores = model(torch.tensor([prompt + other.tokens[:same]])).logits[0, -1].float().log_softmax(-1)
            assert scores[other.tokens[same]] - scores[one.tokens[same]] <= tie
    return equal


def check_tiny(model, folder, asked) -> None:
    expected = answers_of(model, asked)
    with engine(folder, dtype="bfloat16") as llm:
        for _ in range(2):
            equal = check_up_to_rounding(model, asked, served(llm, asked), expected, close=0.01, tie=0.02)
            assert equal > len(asked) * 0.7
        assert count(llm, "vllm:prefix_cache_hits") > len(asked) * BLOCK / 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    place = tmp_path_factory.mktemp("llama")
    save_attached_model(place, "llama")
    return place


def test_an_attached_memory(llama):
    model = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.bfloat16)
    check_tiny(load_attached(model, llama / "adapter"), llama / "vllm", prompts(VOCABULARY, END))


@pytest.mark.slow
def test_our_own_model(tmp_path):
    folder = save_own(tmp_path / "model", "paper", 2, **HEADS)
    check_tiny(EngrammarForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), folder, prompts())


@pytest.mark.slow
def test_patches(tmp_path):
    folder, _, _ = make(tmp_path, PLAIN)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    apply_patch(model, tmp_path / "rich.safetensors", tokenizer())
    check_tiny(model, folder, asked_of_patched())


@pytest.mark.slow
@pytest.mark.parametrize("forget", [forget_history, forget_windows])
def test_control_nothing_is_served_without_history_or_windows(llama, monkeypatch, forget):
    forget(monkeypatch)
    with pytest.raises(ValueError, match="self-test: logits in vLLM differ"), engine(llama / "vllm", dtype="bfloat16"):
        pass


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """SmolLM2-135M with a random memory, whose every weight is non-zero: the base, the adapter, the folder for vLLM."""
    from engrammar_lab.adapters.smollm import fetch_smollm

    place = tmp_path_factory.mktemp("smollm")
    base = fetch_smollm(Path("data/pocket"))
    model = AutoModelForCausalLM.from_pretrained(base)
    sizes = {"layers": (10, 20), "rows_per_head": (20_000, 20_000), "num_heads": 4, "head_dim": 96}
    attach(model, MemoryConfig(**sizes), AutoTokenizer.from_pretrained(base))
    memory, generator = attachment_of(model).memories()["default"], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for table in memory.memory.tables.values():
            table.weight.normal_(0, 0.5, generator=generator)
        for fusion in memory.fusions.values():
            fusion.conv_weight.normal_(0, 0.3, generator=generator)
    save_attached(model, place / "adapter")
    link_folder(str(base), place / "adapter", place / "vllm")
    return base, place / "adapter", place / "vllm"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "least"), [("float32", 20), ("bfloat16", 8)])
def test_a_real_base(smollm, dtype, least):
    base, adapter, folder = smollm
    tokens_of = AutoTokenizer.from_pretrained(base)
    model = load_attached(AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)), adapter)
    texts = [line for line in Path("docs/glossary.md").read_text().splitlines() if len(line) > 80][:24]
    asked = [tokens_of(text).input_ids[: 12 + 2 * number] for number, text in enumerate(texts)]
    expected = answers_of(model, asked)
    with disabled(model):  # the control
        assert num_equal(answers_of(model, asked), expected) == 0
    with engine(folder, {"memory": "disk", "cache_rows": 100}, dtype=dtype, max_num_batched_tokens=64) as llm:
        for _ in range(2):
            found = served(llm, asked)
            assert check_up_to_rounding(model, asked, found, expected, close=CLOSE[dtype], tie=CLOSE[dtype]) >= least
