"""What `generate` returns, compared with full passes of the same model without a cache."""

import torch

EXACT = {"rtol": 0.0, "atol": 1e-5}


def full(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of rows without padding, in one pass without a cache."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def check_generated(model, out, lengths: list[int]) -> None:
    """Compares the logits of every step with those of a full pass over the finished row, without its padding.

    Args:
        lengths: of the prompts; each may have several rows.
    """
    start = out.sequences.shape[1] - len(out.logits)
    for row, ids in enumerate(out.sequences):
        length = lengths[row * len(lengths) // len(out.sequences)]
        logits = full(model, ids[None, start - length :])[0]
        for step, given in enumerate(out.logits):
            torch.testing.assert_close(given[row], logits[length - 1 + step], **EXACT)
