"""Which ids a look-up by token ids may see. Letters: B batch, T tokens."""

from torch import Tensor, nn
from transformers.cache_utils import Cache


def masked_ids(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ids with -1 where masked, the mask of these positions, and where packed documents start.

    As in transformers' attention mask, position ids that restart tell packed documents, where there is neither a mask
    nor a cache.

    Raises:
        ValueError: a mask that is not [B, positions].
    """
    num_tokens = input_ids.shape[1]
    if attention_mask is None:
        if position_ids is None or cache is not None:
            return input_ids, None, None
        starts_BT = nn.functional.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0), value=True)
        return input_ids, None, starts_BT.expand(input_ids.shape[0], -1)
    shape = (input_ids.shape[0], num_tokens + (cache.get_seq_length() if cache is not None else 0))
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != shape:
        raise ValueError(
            f"A model that looks up ids needs an attention_mask of shape [batch, positions] = {list(shape)}, cached "
            "positions included (generate with a static cache makes another: leave cache_implementation out)."
        )
    mask_BT = attention_mask[:, -num_tokens:].bool()
    return input_ids.masked_fill(~mask_BT, -1), mask_BT, None
