"""vLLM's structured output with our memory: the tokens are those of `generate` under the same rules, applied by hand.

A rule by hand is a regular expression: a token may follow if the text can still become a match.
"""

import functools
import json

import pytest
import regex
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-serve` makes an environment with it")
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from engrammar import EngrammarForCausalLM
from models import END, VOCABULARY, tiny_memory, tiny_model
from vllm_engines import BLOCK, Answer, check_equal, count, engine, forget_history, num_equal, prompts, slow

pytestmark = pytest.mark.vllm
LONGEST = 28
PIECES = [
    "<pad>",
    "<bos>",
    "<end>",
    *'{}":,-.0123456789+abcdefghijklmnopqrstuvwxyz',
    '":',
    "th",
    "st",
    "an",
    "ou",
    '{"',
]
CHOICES = ["yes", "no", "not-at-all", "nothing"]
PHRASE = r"(the|an)-[a-z]{3,9}(-[0-9]{1,3})?\."
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "string", "pattern": "^[a-z]{2,5}$"}, "fit": {"enum": ["no", "yes"]}},
    "required": ["size", "fit"],
    "additionalProperties": False,
}
RULES = {  # what vLLM is told, and the same by hand; no piece is white space, which JSON would allow
    "choice": ({"choice": CHOICES}, "|".join(CHOICES)),
    "regex": ({"regex": PHRASE}, PHRASE),
    "json": ({"json": SCHEMA}, r'\{"size":"[a-z]{2,5}","fit":"(no|yes)"\}'),
    "none": ({}, ""),
}
ASKED = list(zip(prompts(), [*RULES] * 15))


class Follows(LogitsProcessor):
    """Leaves what a rule allows after the prompt."""

    def __init__(self, rule: str, num_before: int) -> None:
        self.rule, self.num_before = rule, num_before

    def __call__(self, input_ids, scores):
        return scores.masked_fill(
            ~allowed(self.rule, "".join(PIECES[i] for i in input_ids[0, self.num_before :])), -torch.inf
        )


@functools.cache
def allowed(rule: str, text: str) -> torch.Tensor:
    """Which tokens may follow a text, [V]."""
    pattern = regex.compile(RULES[rule][1])
    follows = [bool(pattern.fullmatch(text + piece, partial=True)) for piece in PIECES]
    follows[:3] = False, False, pattern.fullmatch(text) is not None
    return torch.tensor(follows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("structured") / "model"
    memory = {**tiny_memory("paper"), "boundary": "end", "end_ids": [END]}
    heads = {"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20}
    tiny_model("paper", 2, max_position_embeddings=1024, memory=memory, **heads).save_pretrained(folder)
    merges = [(piece[0], piece[1]) for piece in PIECES[3:] if len(piece) == 2]
    ids = {piece: number for number, piece in enumerate(PIECES)}
    raw = Tokenizer(models.BPE(vocab=ids, merges=merges))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<end>")
    assert len(tokenizer) == VOCABULARY
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder) -> list[Answer]:
    model = EngrammarForCausalLM.from_pretrained(folder)
    return [generated(model, *one) for one in ASKED]


@torch.no_grad()
def generated(model, prompt: list[int], rule: str) -> Answer:
    rules = LogitsProcessorList([Follows(rule, len(prompt))] if rule != "none" else [])
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=LONGEST,
        do_sample=False,
        logits_processor=rules,
        output_scores=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    return Answer(tokens, [scores[0].log_softmax(-1)[token].item() for token, scores in zip(tokens, out.scores)])


def served(llm, asked=ASKED) -> list[Answer]:
    told = [StructuredOutputsParams(**RULES[rule][0]) if rule != "none" else None for _, rule in asked]
    sampling = [SamplingParams(temperature=0, max_tokens=LONGEST, logprobs=0, structured_outputs=one) for one in told]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in asked], sampling, use_tqdm=False)
    return [
        Answer(list(one.token_ids), [step[token].logprob for token, step in zip(one.token_ids, one.logprobs)])
        for one in (output.outputs[0] for output in outputs)
    ]


def structured(folder, memory=None, **given):
    return engine(folder, memory, skip_tokenizer_init=False, **given)


def test_the_twin_follows_the_rules(expected):
    finished = {rule: [] for rule in RULES}
    for (_, rule), answer in zip(ASKED, expected):
        finished[rule].append("".join(PIECES[i] for i in answer.tokens).removesuffix("<end>"))
    for rule in ("choice", "regex", "json"):
        assert all(regex.fullmatch(RULES[rule][1], text) for text in finished[rule])
        assert not any(regex.fullmatch(RULES[rule][1], text) for text in finished["none"])
        assert len({*finished[rule]}) > 2
    assert all(json.loads(text).keys() == {"size", "fit"} for text in finished["json"])


@pytest.mark.parametrize(
    ("backend", "memory"), [slow("xgrammar", {}), ("guidance", {"memory": "disk", "cache_rows": 64})]
)
def test_choices_expressions_and_json_in_one_batch_with_prefix_hits(folder, expected, backend, memory):
    with structured(folder, memory, structured_outputs_config={"backend": backend}) as llm:
        check_equal(served(llm), expected)
        before = count(llm, "vllm:prefix_cache_hits")
        check_equal(served(llm), expected)
        assert count(llm, "vllm:prefix_cache_hits") - before > 40 * BLOCK


@pytest.mark.slow
def test_control_without_history_tokens_differ(folder, expected, monkeypatch):
    forget_history(monkeypatch)
    with structured(folder, {"self_test": False}) as llm:
        assert num_equal(served(llm), expected) <= 20


def test_with_speculation_by_ngrams(folder, expected):
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with structured(folder, speculative_config=speculation) as llm:
        check_equal(served(llm), expected)
        assert count(llm, "vllm:spec_decode_num_accepted_tokens") > 0
