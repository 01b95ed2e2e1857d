"""Scores equal a plain loop over questions, recall equals generate, and switches leave a model as it was."""

import math
import random

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engrammar.fusion import Fusion
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.off import memory_off
from engrammar_lab.tasks.questions import Question, start_ids
from engrammar_lab.tasks.scoring import _batches, score_continuations, score_questions
from engrammar_lab.tasks.yarn import stretched, yarn_parameters
from models import tiny_model
from tasks_models import LETTERS, Knows, byte_tokenizer, choose, letter_tokenizer, recall

IDS = torch.arange(60).reshape(3, 20) % 47 + 3


def ask(context: str, *choices: str, answer: int = 0) -> Question:
    return Question(context=context, choices=choices, answer=answer, task="made/up")


def random_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(LETTERS, k=length))


def logits(model, **kwargs):
    with torch.no_grad():
        return model(IDS, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("batch_tokens", [1, 37, 4096])
def test_batches_score_as_one_row_at_a_time(batch_tokens):
    model, tokenizer, rng = tiny_model("paper"), letter_tokenizer(), random.Random(0)
    pairs = [(random_text(rng, rng.randrange(13)), random_text(rng, rng.randrange(1, 6))) for _ in range(17)]
    scores = score_continuations(model, tokenizer, [*pairs, pairs[3]], batch_tokens=batch_tokens)
    assert scores[-1] == scores[3]
    for (context, continuation), score in zip(pairs, scores):
        before = [1, *tokenizer.encode(context, add_special_tokens=False)]
        after = tokenizer.encode(continuation, add_special_tokens=False)
        log_likelihood = 0.0
        for place, token in enumerate(after):
            with torch.no_grad():
                row = model(torch.tensor([before + after[:place]]), use_cache=False).logits[0, -1]
            log_likelihood += float(row.log_softmax(-1)[token])
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=2e-5)
        assert score.num_bytes == len(continuation) and score.per_byte == score.log_likelihood / len(continuation)


def test_batches_keep_to_the_budget_and_lose_no_row():
    lengths = [(index, length) for index, length in enumerate((1, 2, 2, 5, 9, 30))]
    batches = list(_batches(lengths, 10))
    assert batches == [[0, 1, 2], [3], [4], [5]]


def test_recall_is_what_generate_produces():
    model, tokenizer, rng = tiny_model("paper", seed=4), letter_tokenizer(), random.Random(1)
    questions, expected = [], []
    while len(questions) < 16:
        context = random_text(rng, rng.randrange(1, 9))
        ids = torch.tensor([[1, *tokenizer.encode(context, add_special_tokens=False)]])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, eos_token_id=-1
        )[0, ids.shape[1] :].tolist()
        if min(made) < 3:
            continue  # a special token is no text
        wrong_at = rng.randrange(6)  # half of them are wrong somewhere
        answer = [3 + (token - 2) % 50 if place == wrong_at else token for place, token in enumerate(made)]
        questions.append(ask(context, "".join(tokenizer.convert_ids_to_tokens(answer))))
        expected.append(answer == made)
    assert recall(model, tokenizer, questions) == expected and 3 < sum(expected) < 13


def test_a_model_that_knows_the_answers_is_right_and_one_that_knows_nothing_is_predicted():
    tokenizer = byte_tokenizer()
    questions = [
        ask("Paris is", " in Spain", " in France", " on", answer=1),
        ask("Water is", " wet", " dry, as they say", answer=0),
        ask("Ice is", " warm", " not quite warm", " cold", answer=2),
    ]
    knows = Knows(tokenizer, [question.context + question.right for question in questions]).eval()
    assert choose(knows, tokenizer, questions) == ([1, 0, 2], [1, 0, 2])
    assert recall(knows, tokenizer, questions) == [True, True, True]
    ignorant = Knows(tokenizer).eval()
    total, _ = choose(ignorant, tokenizer, questions)
    assert total == [2, 0, 0]  # the fewest bytes, the first of equals
    assert recall(ignorant, tokenizer, questions) == [False] * 3
    (score,) = score_questions(ignorant, tokenizer, questions[:1])
    assert [choice.per_byte for choice in score] == pytest.approx([-math.log(259)] * 3)


def test_long_wrong_choices_lose_by_total_and_not_by_byte():
    tokenizer = byte_tokenizer()
    half_known = Knows(tokenizer, ["Q: a long answer"]).eval()
    question = ask("Q:", " a long answer!!!!!", " b", answer=0)
    assert choose(half_known, tokenizer, [question]) == ([1], [0])


def test_rows_that_cannot_be_scored_are_refused():
    tokenizer, model = letter_tokenizer(), tiny_model(None, max_position_embeddings=8)
    assert len(score_continuations(model, tokenizer, [("abcde", "fg")])) == 1
    assert score_continuations(model, tokenizer, []) == []
    with pytest.raises(ValueError, match="takes 9 tokens; the model's max_position_embeddings allows 8"):
        score_continuations(model, tokenizer, [("abcdef", "gh")])
    with pytest.raises(ValueError, match="need at least one token"):
        score_continuations(model, tokenizer, [("abc", "")])
    with pytest.raises(ValueError, match="training mode"):
        score_continuations(model.train(), tokenizer, [("abc", "d")])


@pytest.mark.parametrize("dialect", ["paper", "deepseek_v41", "qwen_next"])
def test_memory_off_equals_fusions_that_add_nothing(dialect):
    model = tiny_model(dialect, num_branches=2)
    on = logits(model)
    hooks = [
        module.register_forward_hook(lambda fusion, inputs, output: torch.zeros_like(output))
        for module in model.modules()
        if isinstance(module, Fusion)
    ]
    without = logits(model)
    for hook in hooks:
        hook.remove()
    with memory_off(model):
        assert torch.equal(logits(model), without) and not torch.allclose(without, on, atol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS, use_cache=True).logits, without)
    assert torch.equal(logits(model), on)
    with pytest.raises(KeyError), memory_off(model):
        raise KeyError
    assert torch.equal(logits(model), on)


def test_a_model_without_memory_has_none_to_switch_off():
    with pytest.raises(ValueError, match="without memory"), memory_off(tiny_model(None)):
        pass


def test_stretched_is_the_model_that_transformers_builds_with_yarn(tmp_path):
    model = tiny_model("paper", max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    model.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    plain = logits(model)
    rope = yarn_parameters(1e4, factor=4, length=5)
    built = EngrammarForCausalLM.from_pretrained(tmp_path, rope_parameters=rope, max_position_embeddings=20).eval()
    scaling = model.model.layers[0].self_attn.scaling
    with stretched(model, factor=4, length=5):
        far = logits(model)
        assert torch.isfinite(far).all() and torch.equal(far, logits(built)) and not torch.allclose(far, plain)
        frequencies, amplitude = ROPE_INIT_FUNCTIONS["yarn"](model.config)
        assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
        assert model.model.rotary_emb.attention_scaling == amplitude == 1.0
        assert model.model.layers[0].self_attn.scaling == pytest.approx(scaling * (0.1 * math.log(4) + 1) ** 2)
        assert model.config.max_position_embeddings == 20
        with pytest.raises(ValueError, match="rope_type 'default'"), stretched(model, factor=2, length=5):
            pass
    assert torch.equal(logits(model), plain) and model.config.max_position_embeddings == 64
    assert (tmp_path / "config.json").read_text() == saved


def test_the_lowest_frequency_is_divided_by_the_factor_and_factor_one_changes_nothing():
    model = tiny_model("paper", max_position_embeddings=64)
    plain, before = logits(model), model.model.rotary_emb.inv_freq
    with stretched(model, factor=4, length=20):
        assert float(before[-1] / model.model.rotary_emb.inv_freq[-1]) == pytest.approx(4)
    with stretched(model, factor=1, length=64):
        torch.testing.assert_close(logits(model), plain)
    with pytest.raises(ValueError, match="factor is 0.5"), stretched(model, factor=0.5, length=64):
        pass


def test_a_tokenizer_without_a_beginning_starts_with_the_end_of_text():
    tokenizer = letter_tokenizer()
    assert start_ids(tokenizer) == [1]
    tokenizer.bos_token = None
    assert start_ids(tokenizer) == [2]
    tokenizer.eos_token = None
    assert start_ids(tokenizer) == []
    with pytest.raises(ValueError, match="need at least one token"):
        score_continuations(tiny_model(None), tokenizer, [("", "a")])
