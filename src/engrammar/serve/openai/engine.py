"""Runs a model under transformers' continuous batching, and changes its patches between requests."""

import asyncio
import itertools
import logging
import math
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import lru_cache
from typing import Any, final

from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from engrammar.edit import applied_patches, apply_patch, undo_patch
from engrammar.edit.offering import chosen_stack, offer_patch, offered_patches, withdraw_patch
from engrammar.serve.flat import batched_continuously
from engrammar.serve.openai.asked import Asked, Ids, Limits, Refused
from engrammar.serve.openai.choosing import Choice, carry_choices
from engrammar.serve.openai.sampling import Sampler
from engrammar.versions import check_can_serve

PAGE = 16  # tokens of a page of the cache; prefixes are shared page by page
MOST_ROWS = 64  # requests of a pass
MOST_CHOICES = 64  # sets of patches whose keys are kept in one table; others are put together anew
NO_END = -1  # an id at which no text ends

logger = logging.getLogger(__name__)


@final
class Engine:
    """One model, its requests, and its patches. All methods but `close` belong to one event loop.

    A change of patches waits for the requests that are under way, and lets new ones wait. Then the model gets a new
    cache, so no answer is read from before a change, and none is made of both.
    """

    def __init__(self, model: Any, tokenizer: Any, limits: Limits) -> None:
        check_can_serve()
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        # What was served so far: answers that are "finished", "cancelled" or "failed", requests that were "refused",
        # "prompt_tokens" and "new_tokens", "changes" of patches, "starts" (over 1 + changes after a failure).
        self.counts: Counter[str] = Counter()
        self.sampler = Sampler()
        self.held = self.running = 0  # answers under way or waiting, and requests under way
        self.changing, self.ended = asyncio.Lock(), asyncio.Condition()
        self.numbers = itertools.count()
        # Those of requests under way are carried by them.
        self.read_with = lru_cache(MOST_CHOICES)(lambda chosen: Choice(chosen_stack(model, chosen)))
        self.undo = ExitStack()
        self.undo.enter_context(batched_continuously(model))
        self.manager: Any = None
        self._start()

    def _start(self) -> None:
        """Gives the model an empty cache, and a thread that runs it."""
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            # One block of reserve each: transformers begins no request where 15 % of the cache are not free.
            num_blocks=math.ceil(self.limits.cache_tokens / PAGE) + MOST_ROWS,
            max_batch_tokens=max(self.limits.batch_tokens, MOST_ROWS),
            max_requests_per_batch=MOST_ROWS,
            max_blocks_per_request=0,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        greedy = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=NO_END, pad_token_id=0)
        self.manager = self.model.init_continuous_batching(greedy, config)
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([self.sampler]))
        processors.tensors_required = 1  # the number of each request's drawing
        self.manager.logit_processor = processors
        carry_choices(self.manager)
        self.manager.start()
        self.counts["starts"] += 1

    def _stop(self) -> None:
        self.manager.stop(block=True)
        self.manager.destroy()

    @property
    def failure(self) -> str | None:
        """What ends the thread that runs the model, or has ended it; it is started again for the next request."""
        status = self.manager.background_thread_status
        if status.fatal_error is not None:
            return str(status.fatal_error) or type(status.fatal_error).__name__
        # transformers begins to stop, then fails the requests, and then records the error.
        return "the model stops after an error" if status.local_status == status.HARD_STOP else None

    def check_ids(self, prompts: list[Ids]) -> None:
        """Raises a Refused if the model has no embedding of an id; a tokenizer may have been given more tokens."""
        largest, num_ids = max(map(max, prompts)), len(self.model.get_input_embeddings().weight)
        if largest >= num_ids:
            raise Refused(f"The prompt has the id {largest}, and this model knows ids from 0 to {num_ids - 1}.")

    def reserve(self, num_answers: int) -> None:
        """Takes places for answers; `release` gives them back.

        Raises:
            Refused: there are not enough.
        """
        if self.held + num_answers > self.limits.max_requests:
            raise Refused(
                f"{self.held} answers are under way or waiting, and this server takes {self.limits.max_requests}: "
                "try again later.",
                429,
                "rate_limit_exceeded",
            )
        self.held += num_answers

    def release(self, num_answers: int) -> None:
        self.held -= num_answers

    def choice(self, names: tuple[str, ...]) -> Choice:
        """What a request is read with that has chosen these patches, besides those that are applied for all.

        Raises:
            Refused: a patch is not known, or they do not fit each other.
        """
        offered = self.offered()
        for name in names:
            if name not in (*offered, *self.patches()):
                known = ", ".join(offered) or "none"
                raise Refused(f"No patch {name!r} can be chosen; patches for requests are: {known}.", 404, "no_patch")
        return self.read_with(tuple(name for name in offered if name in names))

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Holds off changes while a request is under way; waits while one is made."""
        async with self.changing:
            if self.failure is not None:
                logger.error("the model is started again after: %s", self.failure)
                await asyncio.to_thread(self._stop)
                self._start()
            self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            async with self.ended:
                self.ended.notify_all()

    async def tokens(
        self, prompt: Ids, asked: Asked, seed: int | None, ends: list[int]
    ) -> AsyncGenerator[Ids, bool | None]:
        """The tokens of one answer, as they come. They end with one of `ends`, at `asked.max_tokens`, or when True is
        sent.

        Raises:
            Refused: the model has failed, or a patch cannot be chosen.
        """
        name, given = f"answer-{next(self.numbers)}", self.manager
        came: asyncio.Queue[Any] = asyncio.Queue()
        choice = self.choice(asked.patches)
        drawing = self.sampler.begin(asked.temperature, asked.top_p, seed)
        given.register_result_handler(name, came.put_nowait)
        seen, outcome = 0, "cancelled"
        try:
            carried = {"drawing": drawing, "choice": choice}
            ending = ends or [NO_END]
            if not given.add_request(prompt, name, asked.max_tokens, streaming=True, eos_token_id=ending, **carried):
                outcome = "failed"
                raise Refused("The model failed (it stops after an error): try again.", 503, "model_failed")
            self.counts["prompt_tokens"] += len(prompt)
            while outcome == "cancelled":
                output = await _next(came, given)
                if output is None or output.error is not None:
                    outcome = "failed"
                    why = "it has stopped" if output is None else output.error
                    raise Refused(f"The model failed ({why}): try again.", 503, "model_failed")
                new, seen = output.generated_tokens[seen:], len(output.generated_tokens)
                self.counts["new_tokens"] += len(new)
                outcome = "finished" if output.is_finished() else outcome
                if new and (yield new):
                    outcome = "stopped"
                    return
        finally:
            if outcome in ("cancelled", "stopped"):
                given.cancel_request(name)
                given.output_router.result_handlers.pop(name, None)
            self.sampler.end(drawing)
            self.counts["finished" if outcome == "stopped" else outcome] += 1

    async def change(self, make: Callable[[], object]) -> None:
        """Changes the model when no request is under way.

        Raises:
            ValueError: as `make`. The patches are then as they were.
        """
        async with self.changing:
            async with self.ended:
                await self.ended.wait_for(lambda: not self.running)
            await asyncio.to_thread(self._stop)
            try:
                await asyncio.to_thread(make)
                self.counts["changes"] += 1
            finally:
                self.read_with.cache_clear()
                self._start()

    def patches(self) -> list[str]:
        """The names of the patches that are applied."""
        return applied_patches(self.model)

    def offered(self) -> list[str]:
        """The names of the patches that requests may choose."""
        return offered_patches(self.model)

    async def add(self, path: str, *, on_request: bool) -> None:
        """Applies the patch in a file for all requests, or offers it to those that choose it."""
        add = offer_patch if on_request else apply_patch
        await self.change(lambda: add(self.model, path, self.tokenizer))

    async def remove(self, name: str) -> None:
        """Takes a patch back, whichever it is."""
        if name not in (*self.patches(), *self.offered()):
            known = ", ".join((*self.patches(), *self.offered())) or "none"
            raise Refused(f"No patch {name!r} is here; these are: {known}.", 404)
        remove = withdraw_patch if name in self.offered() else undo_patch
        await self.change(lambda: remove(self.model, name))

    def close(self) -> None:
        """Ends what is under way, and leaves the model as it was."""
        self.manager.stop(block=True, hard_stop=True)
        self.manager.destroy()
        self.undo.close()


async def _next(came: "asyncio.Queue[Any]", given: Any) -> Any:
    """What comes next; None if the thread has died that runs the manager which the request was given to."""
    while True:
        try:
            return await asyncio.wait_for(came.get(), timeout=1)
        except TimeoutError:
            if not given.is_running() and came.empty():
                return None
