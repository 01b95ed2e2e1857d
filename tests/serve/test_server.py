"""Our server gives, to many clients at once, the greedy tokens of `generate`; it refuses what it would not do."""

import asyncio
import copy
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import batches
from engrammar import EngrammarForCausalLM
from engrammar.attach.paged import PagedState
from engrammar.edit import apply_patch, base_of, build_patch, replace_rows, undo_patch, write_patch
from engrammar.serve.openai.engine import _next
from engrammar.serve.openai.text import TextStream
from models import save_micro
from servers import NAME, NEW, TOKEN, ask, client_of, complete, serving

TEXTS = ["To be", "question", "or not to be, that is", "To be, or not to be, that is the question. " * 5, "To"]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("CRITICAL", logger=batches.LOGGER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    folder.mkdir()
    torch.manual_seed(0)
    save_micro(folder)
    model = EngrammarForCausalLM.from_pretrained(folder)
    for block in model.model.layers:
        if block.fusion is not None:
            torch.nn.init.normal_(block.fusion.conv_weight)
    for table in model.model.memory.tables.values():
        torch.nn.init.normal_(table.weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    return tokenizer


def load(folder, **settings):
    return EngrammarForCausalLM.from_pretrained(folder, **settings).eval()


@torch.no_grad()
def generated(model, ids: list[int]) -> list[int]:
    model.generation_config.eos_token_id = None
    return model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def expected(folder, tokenizer):
    model = load(folder)
    return {text: generated(model, tokenizer(text).input_ids) for text in TEXTS}


@pytest.fixture(scope="module")
def server(folder, tokenizer):
    with serving(load(folder, memory="disk", cache_rows=64), tokenizer) as running:
        yield running


def test_many_clients_get_the_tokens_of_generate(server, expected):
    """Of short prompts and one that takes several passes; each asked twice, the second time with shared prefixes."""
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        for _ in range(2):
            for text, completion in zip(TEXTS, pool.map(lambda text: complete(server, text), TEXTS)):
                assert completion.choices[0].token_ids == expected[text]
                assert completion.choices[0].finish_reason == "length"
                assert completion.usage.completion_tokens == NEW
    assert len(client_of(server).models.list().data) == 1


def test_without_history_the_tokens_differ(folder, tokenizer, expected, monkeypatch):
    seen = PagedState.seen

    def nothing(state, values_P, places_T, missing):
        return torch.full_like(seen(state, values_P, places_T, missing), missing)

    monkeypatch.setattr(PagedState, "seen", nothing)
    with serving(load(folder), tokenizer) as server:
        different = [complete(server, text).choices[0].token_ids != expected[text] for text in TEXTS]
    assert sum(different) >= len(TEXTS) - 1


def test_a_stream_is_the_whole_in_pieces_and_ends_at_a_stop_text(server, tokenizer, expected):
    text = TEXTS[2]
    whole = complete(server, text)
    pieces = [*complete(server, text, stream=True, stream_options={"include_usage": True})]
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert [one for piece in pieces[:-1] for one in piece.choices[0].token_ids] == expected[text]
    assert pieces[-2].choices[0].finish_reason == "length" and pieces[-1].usage == whole.usage
    stop, before = whole.choices[0].text[3:5], server.engine.counts.copy()
    stopped = complete(server, text, stop=[stop])
    assert stopped.choices[0].text == whole.choices[0].text.partition(stop)[0]
    assert stopped.choices[0].finish_reason == "stop"
    assert server.engine.counts["finished"] == before["finished"] + 1
    assert server.engine.counts["cancelled"] == before["cancelled"]


def test_a_chat_is_the_completion_of_its_template(server, tokenizer):
    messages = [{"role": "user", "content": "To be?"}]
    settings = {"model": NAME, "messages": messages, "max_tokens": NEW, "temperature": 0}
    chat = client_of(server).chat.completions.create(**settings)
    same = complete(server, "user: To be?\nassistant: ", extra_body={})
    assert chat.choices[0].message.content == same.choices[0].text
    stream = client_of(server).chat.completions.create(**settings, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == same.choices[0].text


def test_each_request_is_sampled_by_its_own_settings(server, expected):
    """A greedy one, and two that are drawn, at once; a seed gives the same again, alone."""
    asked = [{}, {"temperature": 1.5, "seed": 5, "n": 2}, {"temperature": 1.5, "seed": 60, "top_p": 0.9}]
    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(lambda settings: complete(server, TEXTS[0], **settings), asked)]
    drawn = [choice.token_ids for choice in found[1].choices]
    assert found[0].choices[0].token_ids == expected[TEXTS[0]]
    assert len({tuple(one) for one in [*drawn, found[2].choices[0].token_ids, expected[TEXTS[0]]]}) == 4
    again = complete(server, TEXTS[0], **asked[1])
    assert [choice.token_ids for choice in again.choices] == drawn


def test_a_request_that_is_cancelled_ends(server):
    before = server.engine.counts["cancelled"]
    stream = complete(server, TEXTS[0], max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        endless = {"max_tokens": 200, "extra_body": {"ignore_eos": True}}
        client_of(server).with_options(timeout=0.05).completions.create(model=NAME, prompt="To", **endless)
    deadline = time.monotonic() + 60
    while server.engine.held and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.engine.held == server.engine.running == 0
    assert server.engine.counts["cancelled"] > before


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "other", "prompt": "To"}, 404, "'other' is not served here; 'tiny' is"),
        ({"prompt": "To " * 300}, 400, "this server takes 256 together"),
        ({"prompt": "To", "max_tokens": 256}, 400, "this server takes 256 together"),
        ({"prompt": "To", "n": 25}, 429, "this server takes 24"),
        ({"prompt": "To", "n": 0}, 400, "n is 0; allowed: 1 to 128"),
        ({"prompt": "To", "temperature": "hot"}, 400, 'temperature is "hot"; allowed: 0 to 2'),
        ({"prompt": "To", "logprobs": 3}, 400, "logprobs is 3; this server takes false"),
        ({"prompt": "To", "presence_penalty": 0.5}, 400, "presence_penalty is 0.5"),
        ({"prompt": "To", "top_k": 3}, 400, "top_k is 3; this server takes 0 or -1"),
        ({"prompt": "To", "repetition_penalty": 1.1}, 400, "repetition_penalty is 1.1; this server takes 1 or 1.0"),
        ({"prompt": "To", "typical_p": 0.5}, 400, "'typical_p' is not known to this server"),
        ({"prompt": []}, 400, "prompt is not a text"),
        ({"prompt": [5, 300]}, 400, "ids from 0 to"),
        ({"prompt": ""}, 400, "The prompt has no tokens"),
        ({"prompt": ["To", "be\ud800"]}, 400, "half a character"),
        ({"prompt": "To", "stop": [1]}, 400, "stop is not a text"),
        ({"prompt": "To", "stream": "yes"}, 400, 'stream is "yes"'),
    ],
)
def test_what_is_not_served_is_refused_in_a_sentence(server, body, status, said):
    found, answer = ask(server, "/v1/completions", json.dumps({"model": NAME, **body}).encode())
    assert found == status and said in answer["error"]["message"]


def test_what_clients_send_unasked_changes_nothing(server, expected):
    """As `vllm bench serve` and others do: fields of OpenAI's and of vLLM's API with values that ask for nothing."""
    unasked = {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0, "use_beam_search": False, "min_tokens": 0}
    body = {"model": NAME, "prompt": TEXTS[0], "max_tokens": NEW, "temperature": 0, "logprobs": None, "best_of": 1}
    body |= {"ignore_eos": True, "return_token_ids": True, **unasked}
    status, answer = ask(server, "/v1/completions", json.dumps(body).encode())
    assert status == 200 and answer["choices"][0]["token_ids"] == expected[TEXTS[0]]


@pytest.mark.parametrize(
    "messages",
    [None, [], ["To"], [{"role": "user", "content": 3}], [{"role": "tool", "content": "", "tool_call_id": "1"}]],
)
def test_messages_that_are_none_are_refused(server, messages):
    body = json.dumps({"model": NAME, "messages": messages}).encode()
    assert ask(server, "/v1/chat/completions", body)[0] == 400
    assert ask(server, "/v1/completions", b"no JSON")[0] == ask(server, "/v1/completions", b"[]")[0] == 400


def test_health_and_metrics(server):
    complete(server, TEXTS[0])
    assert ask(server, "/health") == (200, {"status": "ok"})
    _, before = ask(server, "/metrics")
    complete(server, TEXTS[0])
    _, after = ask(server, "/metrics")

    def count(text: str, name: str) -> float:
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"engrammar_{name}"))

    assert count(after, "rows_read_total") > count(before, "rows_read_total") > 0
    hits, misses = (count(after, f"cache_{name}_total") for name in ("hits", "misses"))
    assert hits + misses > 0 and count(after, "tokens_total") > count(before, "tokens_total")
    assert count(after, 'answers_total{outcome="finished"}') == count(before, 'answers_total{outcome="finished"}') + 1


def test_after_a_failure_the_model_is_started_again(folder, tokenizer, expected, monkeypatch):
    """Also if the next question comes after a client has been told, and before transformers has recorded the error."""
    with serving(load(folder), tokenizer) as server:
        engine, memory, asked = server.engine, server.engine.model.model.memory, threading.Event()
        status = engine.manager.background_thread_status
        record, stop, retrieve = status.record_fatal_error, engine._stop, memory.retrieve

        def fail(*given, **named):
            raise OSError("the disk is gone")

        def record_late(error):
            assert asked.wait(60)
            record(error)

        def stop_when_asked():
            asked.set()
            stop()

        monkeypatch.setattr(memory, "retrieve", fail)
        monkeypatch.setattr(status, "record_fatal_error", record_late)
        monkeypatch.setattr(engine, "_stop", stop_when_asked)
        with pytest.raises(openai.InternalServerError, match="the disk is gone"):
            complete(server, TEXTS[0])
        assert ask(server, "/health")[0] == 503
        monkeypatch.setattr(memory, "retrieve", retrieve)
        assert complete(server, TEXTS[0]).choices[0].token_ids == expected[TEXTS[0]]
        assert ask(server, "/health")[0] == 200 and engine.counts["starts"] == 2


def test_ids_that_the_model_has_no_embedding_of_are_refused(folder, tokenizer, expected):
    """They would end the thread that runs the model, and with it the requests of all clients."""
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<unknown>"])
    with serving(load(folder), longer) as server:
        for prompt in ("To <unknown>", [5, len(tokenizer)]):
            status, answer = ask(server, "/v1/completions", json.dumps({"model": NAME, "prompt": prompt}).encode())
            assert status == 400 and f"ids from 0 to {len(tokenizer) - 1}" in answer["error"]["message"]
        assert complete(server, TEXTS[0]).choices[0].token_ids == expected[TEXTS[0]]
        assert server.engine.counts["starts"] == 1


def test_a_request_that_a_stopping_model_drops_is_told(folder, tokenizer, monkeypatch):
    with serving(load(folder), tokenizer) as server:
        monkeypatch.setattr(server.engine.manager, "add_request", lambda *_, **__: None)
        with pytest.raises(openai.InternalServerError, match="it stops after an error"):
            complete(server, TEXTS[0])
        assert server.engine.held == server.engine.running == 0


def test_a_request_waits_for_the_manager_that_it_was_given_to():
    """Another one may have been started meanwhile."""
    assert asyncio.run(_next(asyncio.Queue(), SimpleNamespace(is_running=lambda: False))) is None


def patch_of_rows(model, tokenizer, path):
    """A patch that replaces every row of the first memory layer."""
    layer = model.model.memory.config.layers[0]
    num_rows = model.model.memory.table(layer).shape[0]
    values = torch.randn(num_rows, model.model.memory.config.head_dim, generator=torch.Generator().manual_seed(9)) * 3
    changed = replace_rows(model.model.memory, {layer: (torch.arange(num_rows), values)})
    patch = build_patch("rows", base_of(model, tokenizer), rows=changed)
    write_patch(patch, path)
    return patch


def test_a_patch_changes_every_answer_that_begins_after_it_and_none_before(folder, tokenizer, expected, tmp_path):
    """Answers that are under way end as they began; a prefix that is cached is not read from before a change."""
    model = load(folder, memory="ram")
    patch = patch_of_rows(model, tokenizer, tmp_path / "rows.safetensors")
    content, text = (tmp_path / "rows.safetensors").read_bytes(), TEXTS[3]
    apply_patch(model, patch, tokenizer)
    patched = generated(model, tokenizer(text).input_ids)
    undo_patch(model)
    assert patched != expected[text]
    with serving(model, tokenizer) as server:
        assert complete(server, text).choices[0].token_ids == expected[text]
        assert ask(server, "/v1/patches", content)[0] == ask(server, "/v1/patches", content, token="no")[0] == 401
        with ThreadPoolExecutor(1) as pool:
            stream = iter(complete(server, text, stream=True))
            begun = [*next(stream).choices[0].token_ids]
            applied = pool.submit(ask, server, "/v1/patches", content, token=TOKEN)
            assert [*begun, *(one for piece in stream for one in piece.choices[0].token_ids)] == expected[text]
            assert applied.result() == (200, {"object": "list", "data": [{"id": "rows", "on_request": False}]})
        assert complete(server, text).choices[0].token_ids == patched
        status, answer = ask(server, "/v1/patches", content, token=TOKEN)
        assert status == 400 and "is applied already" in answer["error"]["message"]
        assert complete(server, text).choices[0].token_ids == patched
        assert ask(server, "/v1/patches/other", method="DELETE", token=TOKEN)[0] == 404
        assert ask(server, "/v1/patches/rows", method="DELETE", token=TOKEN)[0] == 200
        assert complete(server, text).choices[0].token_ids == expected[text]
        assert server.engine.counts["changes"] == 2


def test_without_a_token_nobody_changes_patches(folder, tokenizer):
    with serving(load(folder), tokenizer, token=None) as server:
        assert ask(server, "/v1/patches", b"", token="")[0] == 403


def test_text_waits_for_whole_letters_and_for_what_may_become_a_stop_text(tokenizer):
    ids = tokenizer("be, naïve 日本 question").input_ids
    stream = TextStream(tokenizer, tokenizer("To").input_ids, ("tion!",))
    pieces = [stream.put(one) for one in ids]
    assert not any("\ufffd" in piece for piece in pieces) and not "".join(pieces).endswith("t")
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids)


@pytest.mark.parametrize("prompt", ["Question: what is \ufffd", "The capital is é"])
def test_a_prompt_that_ends_in_half_a_letter_is_no_part_of_the_answer(tokenizer, prompt):
    ids = tokenizer(prompt).input_ids
    ids = ids if prompt.endswith("\ufffd") else ids[:-1]
    assert tokenizer.decode(ids).endswith("\ufffd")
    answer = tokenizer(" be the question").input_ids
    stream = TextStream(tokenizer, ids, ("Question", "capital"))
    pieces = [stream.put(one) for one in answer]
    assert "".join(pieces) + stream.end() == " be the question" and not stream.stopped


def test_letters_of_bytes_that_a_broken_one_takes_along_are_text_and_no_error():
    """As tokenizers with byte fallback decode them, those of Llama 2, Mistral and Gemma."""
    bytes_of = {f"<0x{byte:02X}>": byte for byte in range(256)}
    model = models.BPE({**bytes_of, "a": 256, "b": 257, "\u2581": 258}, [], byte_fallback=True)
    backend = Tokenizer(model)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=backend), [256, 257], ())
    said = "".join(stream.put(one) for one in (0xC3, 0xA9, 0xE2, 256, 258, 257))
    assert said + stream.end() == "é\ufffda b"


def test_a_thread_that_holds_a_place_gives_it_back(server):
    """Refusals and streams that nobody reads leave no place taken."""
    threads = [threading.Thread(target=complete, args=(server, text)) for text in TEXTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.engine.held == 0
