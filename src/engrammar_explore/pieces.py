"""A text cut into tokens, as a person can read them."""

from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str, most_tokens: int) -> tuple[list[int], list[tuple[str, int]]]:
    """The ids of a text; and of each token its text, and which part of that text it is (0 for the first or only one).

    A text has the spaces before it, so that together they are the whole. Tokens of single bytes make one character
    together: each has the whole character, and its number.

    Raises:
        ValueError: there is no token, or there are too many.
    """
    is_fast = bool(getattr(tokenizer, "is_fast", False))
    given = tokenizer(text, return_offsets_mapping=is_fast, verbose=False)
    ids = list(given["input_ids"])
    if not ids:
        raise ValueError("The text has no token: type a word.")
    if len(ids) > most_tokens:
        raise ValueError(f"The text has {len(ids):,} tokens; allowed: {most_tokens:,}: shorten it.")
    if not is_fast:
        return ids, [(token_text(tokenizer, one), 0) for one in ids]
    pieces: list[tuple[str, int]] = []
    before = (0, 0)
    for token_id, (start, end) in zip(ids, given["offset_mapping"], strict=True):
        piece, part = text[min(before[1], start) : end], 0
        if start == end:  # a token of the tokenizer's own, such as one that begins a text
            piece = token_text(tokenizer, token_id)
        elif before == (start, end):
            piece, part = pieces[-1][0], pieces[-1][1] + 1
        before = (start, max(end, before[1]))
        pieces.append((piece, part))
    return ids, pieces


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """The text of one id by itself."""
    return tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
