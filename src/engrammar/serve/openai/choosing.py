"""Requests of one batch with patches of their own: transformers carries each request's stack, and keeps prefixes apart.

transformers finds a prefix by a hash of its ids, page by page, each with that of the page before. Here the first page
is hashed with the stack's number too, so that requests share keys and values only with requests of the same patches.
"""

import hashlib
from array import array
from collections.abc import Callable
from typing import Any, final

from engrammar.edit.sequences import STACKS
from engrammar.edit.stack import Stack

NUMBERED = 4  # ids that are hashed with the number, 128 bits; all of them stand in the first page


@final
class Choice:
    """What a request is read with. transformers copies what a request carries; a choice is the same in all copies."""

    def __init__(self, stack: Stack | None) -> None:
        self.stack = stack

    def __deepcopy__(self, memo: Any) -> "Choice":
        return self


def carry_choices(manager: Any) -> None:
    """Lets a manager of continuous batching carry the choices of requests ("choice" among what they give to logits)."""
    create = manager._create_batch_processor

    def create_batch_processor() -> Any:
        batches = create()
        vars(batches.cache)[STACKS] = lambda: [
            stack_of(one.state) for one in batches.inputs_and_outputs.requests_in_batch
        ]
        keep_prefixes_apart(batches.cache, batches.scheduler)
        return batches

    manager._create_batch_processor = create_batch_processor


def stack_of(state: Any) -> Stack | None:
    """What a request is read with, of transformers' state of it."""
    choice: Choice = state.logit_processor_kwargs["choice"]
    return choice.stack


def keep_prefixes_apart(cache: Any, scheduler: Any) -> None:
    """Lets requests of a paged cache share prefixes only where they are read with the same stack."""

    def numbered(name: str, ids: list[int]) -> list[int]:
        state = scheduler.active_requests.get(name) or scheduler.waiting_requests[name]
        return with_number(stack_of(state), ids)

    def marking(mark: Callable[..., None]) -> Callable[..., None]:
        return lambda name, ids, num_blocks: mark(name, numbered(name, ids), num_blocks)

    search = cache.search_prefix_match
    vars(cache)["search_prefix_match"] = lambda name, ids: search(name, numbered(name, ids))
    for allocator in cache.cache_allocators.values():
        assert allocator.tokens_per_page >= NUMBERED
        vars(allocator)["mark_complete_blocks"] = marking(allocator.mark_complete_blocks)


def with_number(stack: Stack | None, ids: list[int]) -> list[int]:
    """Ids as they are hashed: in place of the first ones, a digest of them and of a stack's number, if there is one."""
    if stack is None or len(ids) < NUMBERED:
        return ids
    said = hashlib.shake_128(array("q", [stack.number, *ids[:NUMBERED]]).tobytes())
    return [*array("i", said.digest(4 * NUMBERED)), *ids[NUMBERED:]]
