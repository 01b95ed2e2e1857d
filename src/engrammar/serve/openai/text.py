"""Tokens to text, as they come: half a letter waits for the rest, and what may become a stop text waits too."""

from typing import Any, final

from tokenizers.decoders import DecodeStream

BROKEN = "\ufffd"  # what half a letter is decoded to

CONTEXT = 8  # ids of the prompt before the answer: a tokenizer may leave out the space of a text's first word


@final
class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: Any, prompt: list[int], stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer.backend_tokenizer, stop
        self.stopped = False  # whether a stop text has come; what follows it is not read
        self.held, self.context = "", prompt[-CONTEXT:]
        # `DecodeStream` would give a context that ends in half a letter back with the first text.
        while self.tokenizer.decode(self.context, skip_special_tokens=True).endswith(BROKEN):
            self.context.pop()
        self.decoding = DecodeStream(self.context, skip_special_tokens=True)

    def put(self, token: int) -> str:
        """The text that is certain after one more token; it may be empty."""
        try:
            self.held += self.decoding.step(self.tokenizer, token) or ""
        except Exception:  # tokenizers': with byte fallback, a broken letter takes the letters before it along
            self.decoding = DecodeStream(self.context, skip_special_tokens=True)
            self.held += BROKEN + (self.decoding.step(self.tokenizer, token) or "")
        found = [place for place in (self.held.find(one) for one in self.stop) if place >= 0]
        if found:
            self.stopped = True
            self.held = self.held[: min(found)]
            return self.end()
        kept = max((size for one in self.stop for size in range(len(one)) if self.held.endswith(one[:size])), default=0)
        certain, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return certain

    def end(self) -> str:
        """What was held back, when no more tokens come. Half a letter is left out."""
        certain, self.held = self.held, ""
        return certain
