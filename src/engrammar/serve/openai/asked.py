"""What a request asks for. A field that would change the answer and is not known here is refused, not left out."""

import json
from collections.abc import AsyncIterable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engrammar.config import check_setting

Kind = Literal["completions", "chat"]
Ids = list[int]

COMMON = {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "n"}
COMMON |= {"ignore_eos", "return_token_ids", "vllm_xargs"}  # as in vLLM
COMMON |= {"patches"}
FIELDS: dict[Kind, set[str]] = {
    "completions": COMMON | {"prompt"},
    "chat": COMMON | {"messages", "max_completion_tokens"},
}
UNUSED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # change no answer
# What other fields may be, of OpenAI and of vLLM: the values that ask for nothing. Clients send them unasked.
NEUTRAL: dict[str, list[Any]] = {
    "best_of": [1],
    "echo": [False],
    "frequency_penalty": [0, 0.0],
    "function_call": ["none"],
    "functions": [[]],
    "logit_bias": [{}],
    "logprobs": [False],
    "min_p": [0, 0.0],
    "min_tokens": [0],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "presence_penalty": [0, 0.0],
    "repetition_penalty": [1, 1.0],
    "response_format": [{"type": "text"}],
    "suffix": [""],
    "tool_choice": ["none"],
    "tools": [[]],
    "top_k": [0, -1],
    "top_logprobs": [0],
    "use_beam_search": [False],
}


class Refused(ValueError):
    """A request that is not answered: one sentence, and the status and code of OpenAI's API."""

    def __init__(self, sentence: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(sentence)
        self.status, self.code = status, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


async def body_of(stream: AsyncIterable[bytes], most: int) -> bytes:
    """The body of a request, which comes in parts.

    Raises:
        Refused: it is longer than `most` bytes.
    """
    parts, size = [], 0
    async for part in stream:
        size += len(part)
        if size > most:
            raise Refused(f"The body has more than {most:,} bytes.", 413)
        parts.append(part)
    return b"".join(parts)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes."""

    max_length: int  # tokens of a prompt and its answer together
    max_requests: int = 256  # answers under way or waiting, of all clients
    cache_tokens: int = 8192  # positions of all requests that are kept; more requests wait, or are computed again
    batch_tokens: int = 512  # of one pass; longer prompts are cut

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_setting(name, value, value >= 1, "1 or more")
        if self.max_length > self.cache_tokens:
            raise ValueError(
                f"max_length is {self.max_length}, and the cache keeps {self.cache_tokens} tokens: a request has to "
                "fit in; give a larger cache_tokens or a smaller max_length."
            )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, checked."""

    prompts: list[Ids]
    num_answers: int = 1  # to each prompt
    max_tokens: int  # of an answer
    temperature: float  # 0 is greedy
    top_p: float = 1.0
    seed: int | None = None  # of the sampling; None draws one
    stop: tuple[str, ...] = ()  # texts at which an answer ends
    stream: bool = False  # whether the answer is sent in pieces
    usage: bool = False  # whether the last piece counts tokens
    ignore_eos: bool = False  # whether an answer goes on after the end of a text
    token_ids: bool = False  # whether answers bring their ids
    patches: tuple[str, ...] = ()  # names of those that it has chosen

    @property
    def sequences(self) -> list[Ids]:
        """The prompt of each answer."""
        return [ids for ids in self.prompts for _ in range(self.num_answers)]


def read_asked(raw: bytes, kind: Kind, name: str, tokenizer: Any, limits: Limits) -> Asked:
    """Reads the body of a request.

    Args:
        name: the name that the model is served under.

    Raises:
        Refused: it is not JSON, names another model, asks for what is not served, or for more than the limits.
    """
    body = _object(raw)
    if body.get("model") != name:
        raise Refused(f"The model {body.get('model')!r} is not served here; {name!r} is.", 404, "model_not_found")
    for field, value in body.items():
        if field in FIELDS[kind] or field in UNUSED or value is None:
            continue
        allowed = NEUTRAL.get(field)
        if allowed is None:
            raise Refused(f"{field!r} is not known to this server, so it is not left out in silence: leave it out.")
        if not any(type(value) is type(one) and value == one for one in allowed):
            said = " or ".join(json.dumps(one) for one in allowed)
            raise Refused(f"{field} is {json.dumps(value)[:80]}; this server takes {said}: leave it out.")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise Refused("stream_options may hold include_usage, and nothing else.")
    prompts = _chat(body, tokenizer) if kind == "chat" else _prompts(body, tokenizer)
    longest = max(map(len, prompts))
    seed = body.get("seed")
    asked = Asked(
        prompts=prompts,
        num_answers=_number(body, "n", 1, lambda n: 1 <= n <= 128, "1 to 128"),
        max_tokens=_max_tokens(body, kind, limits.max_length - longest),
        temperature=_number(body, "temperature", 1.0, lambda t: 0 <= t <= 2, "0 to 2"),
        top_p=_number(body, "top_p", 1.0, lambda p: 0 < p <= 1, "over 0, up to 1"),
        seed=None if seed is None else _number(body, "seed", 0, lambda s: abs(s) < 2**63, "64 bits"),
        stop=_stop(body),
        stream=_flag(body, "stream"),
        usage=bool(options.get("include_usage")),
        ignore_eos=_flag(body, "ignore_eos"),
        token_ids=_flag(body, "return_token_ids"),
        patches=_patches(body),
    )
    if longest + asked.max_tokens > limits.max_length:
        raise Refused(
            f"The prompt has {longest} tokens and {asked.max_tokens} are asked for; this server takes "
            f"{limits.max_length} together: shorten the prompt, or ask for fewer.",
            code="context_length_exceeded",
        )
    return asked


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(f"The body is not JSON ({error}).") from error
    if not isinstance(body, dict):
        raise Refused("The body is not a JSON object.")
    return body


def _number(body: Mapping[str, Any], name: str, default: Any, holds: Callable[[Any], bool], allowed: str) -> Any:
    """A number of the kind of its default."""
    value, kind = default if body.get(name) is None else body[name], type(default)
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits or not holds(value):
        raise Refused(f"{name} is {json.dumps(value)[:80]}; allowed: {allowed}.")
    return kind(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name) or False
    if not isinstance(value, bool):
        raise Refused(f"{name} is {json.dumps(value)[:80]}; allowed: true or false.")
    return value


def _max_tokens(body: Mapping[str, Any], kind: Kind, left: int) -> int:
    """Tokens of an answer; by default as OpenAI's: 16 for a completion, what fits for a chat."""
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    default = 16 if kind == "completions" else max(left, 1)
    found: int = _number(body, name, default, lambda n: n >= 1, "1 or more")
    return found


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop) or len(stop) > 16:
        raise Refused("stop is not a text, or a list of up to 16 texts.")
    return tuple(stop)


def _patches(body: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `patches`, or in `vllm_xargs`, where vLLM takes what it does not know itself."""
    own, others = body.get("patches"), body.get("vllm_xargs") or {}
    if not isinstance(others, dict) or others.keys() - {"patches"} or (own is not None and others):
        raise Refused("vllm_xargs may hold patches, if they are not named beside it, and nothing else.")
    return read_names(own if own is not None else others.get("patches") or [])


def read_names(named: Any) -> tuple[str, ...]:
    """The patches that a request names, one or a list."""
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
        raise Refused("patches is not a list of names.")
    return tuple(named)


def _prompts(body: Mapping[str, Any], tokenizer: Any) -> list[Ids]:
    prompt = body.get("prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise Refused("prompt is not a text, a list of ids, or a list of these.")
    return [
        _ids(tokenizer(whole_characters(one)).input_ids if isinstance(one, str) else one, len(tokenizer))
        for one in prompt
    ]


def whole_characters(text: str) -> str:
    """The text; raises a Refused if tokenizers would not take it, since JSON may hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused("The text has half a character: give it again, whole.") from error
    return text


def _ids(ids: Any, num_ids: int) -> Ids:
    if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < num_ids for one in ids):
        raise Refused(f"prompt holds something that is neither a text nor a list of ids from 0 to {num_ids - 1}.")
    if not ids:
        raise Refused("The prompt has no tokens: give at least one.")
    return ids


def _chat(body: Mapping[str, Any], tokenizer: Any) -> list[Ids]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages is not a list of messages.")
    if not tokenizer.chat_template:
        raise Refused("This model's tokenizer has no chat template: use /v1/completions.")
    said = [{**_message(one), "content": _content(one.get("content"))} for one in messages]
    try:
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=True, return_dict=True)
    except Exception as error:  # a template raises what it likes
        raise Refused(f"The chat template refuses these messages ({' '.join(str(error).split())[:200]}).") from error
    return [_ids(list(ids["input_ids"]), len(tokenizer))]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused("A message is not an object with a role and a content.")
    unknown = [name for name, value in message.items() if name not in ("role", "content", "name") and value]
    if unknown:
        raise Refused(f"A message has {unknown[0]!r}; this server takes role and content.")
    return message


def _content(content: Any) -> str:
    """The text of a message, which may come in parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise Refused("A message's content is not a text; this server takes texts only.")
    return whole_characters("".join(part["text"] for part in parts))
