"""Each request of a batch is sampled by its own settings and its own random numbers.

transformers' continuous batching samples all requests in one way, or none. Here none: a token is the largest score,
and the scores of requests that sample are disturbed before (a draw from a distribution is the largest of p / e, where
each e is drawn from the exponential distribution).
Letters: N tokens to be sampled, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from engrammar.serve.openai.choosing import Choice

GREEDY = 0  # the number of no request


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawing:
    """How one request is sampled; `random` draws for it alone."""

    temperature: float
    top_p: float
    random: torch.Generator

    def disturb(self, logits_V: Tensor) -> Tensor:
        """Scores whose largest is a draw."""
        p_V = (logits_V / self.temperature).softmax(-1)
        if self.top_p < 1:
            sorted_V, order_V = p_V.sort(descending=True)
            cut_V = sorted_V.cumsum(-1) - sorted_V >= self.top_p  # the most probable one is never cut
            p_V = p_V.index_fill(0, order_V[cut_V], 0.0)
        draw_V = torch.empty(len(p_V)).exponential_(generator=self.random)
        return p_V / draw_V.to(p_V.device)


@final
class Sampler(ContinuousBatchingLogitsProcessor):
    """Disturbs the scores of requests that sample. A request brings the number that it was given here.

    What a request is read with is brought the same way; it is for `choosing`.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {"drawing": int, "choice": Choice}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.drawings: dict[int, Drawing] = {}
        self.last = GREEDY

    def begin(self, temperature: float, top_p: float, seed: int | None) -> int:
        """The number of a request that begins; `end` frees it."""
        if temperature == 0:
            return GREEDY
        random = torch.Generator()
        random.seed() if seed is None else random.manual_seed(seed)
        self.last = self.last % (2**31 - 1) + 1
        self.drawings[self.last] = Drawing(temperature=temperature, top_p=top_p, random=random)
        return self.last

    def end(self, number: int) -> None:
        self.drawings.pop(number, None)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.fill_(GREEDY)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        given = [request.state.logit_processor_kwargs for request in requests_with_new_token]
        return torch.tensor([kwargs.get("drawing", GREEDY) for kwargs in given], dtype=torch.int32)

    def __call__(self, scores_NV: Tensor, numbers: Tensor) -> Tensor:
        """Called by transformers with a number for each row; those of cancelled requests are not known any more."""
        for row, number in enumerate(numbers[: len(scores_NV)].tolist()):
            if (drawing := self.drawings.get(number)) is not None:
                scores_NV[row] = drawing.disturb(scores_NV[row])
        return scores_NV
