"""Small made-up texts."""

import numpy as np

WORDS = ("the", "of", "moss", "tern", "ridge", "copper", "water", "north", "stone", "grows", "flies", "falls")


def make_texts(num_documents: int) -> list[str]:
    """Different texts of uneven length, with code points of one to four bytes and the name of a special token."""
    rng = np.random.default_rng(0)
    texts = [" ".join([*rng.choice(WORDS, rng.integers(1, 30)), str(i)]) for i in range(num_documents)]
    texts[3] += " naïve Ω 🜁 <|end|>\n\ttail  "
    return texts
