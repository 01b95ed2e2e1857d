"""Rows on their way to an accelerator while it computes: through pinned memory, on a stream of their own.

A thread waits for the rows on the host and starts their copy, so the model's own thread does neither. Whoever reads
the copy makes the device wait for it, and not the host.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]
Made = TypeVar("Made", bound=Tensors)


@final
class DeviceCopies:
    """Copies to one device, in the order in which they are started."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.Stream(device)
        self.thread = ThreadPoolExecutor(1, "engrammar-to-device")

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeviceCopies":
        return DeviceCopies(self.device)  # with a stream and a thread of its own

    def start(self, wait: Callable[[], Tensors], make: Callable[[Any], Made]) -> Callable[[], Made]:
        """Starts to copy tensors, and to make others of them on the device.

        Args:
            wait: waits for tensors in the host's memory; it runs in this object's thread.
            make: makes what is wanted of their copies.

        Returns:
            A function that returns what `make` made. What its caller's current stream does from then on comes after
            it. The function raises what `wait` and `make` raise.
        """
        return partial(self._read, self.thread.submit(self._copy, wait, make))

    def _copy(self, wait: Callable[[], Tensors], make: Callable[[Any], Made]) -> tuple[Made, torch.Event]:
        pinned = [None if x is None else x.pin_memory() for x in wait()]
        with self.stream:
            made = make(tuple(None if x is None else x.to(self.device, non_blocking=True) for x in pinned))
        return made, self.stream.record_event()

    def _read(self, copying: Future[tuple[Made, torch.Event]]) -> Made:
        made, finished = copying.result()
        reading = torch.accelerator.current_stream(self.device)
        reading.wait_event(finished)
        for x in made:
            if x is not None:
                x.record_stream(reading)  # its memory is the copying stream's, which may not use it again before then
        return made

    def close(self) -> None:
        """Waits for the copies that were started."""
        self.thread.shutdown()


def on_host(numbers: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors of integers, on the host. They leave a device in one piece, since a transfer waits for all its work."""
    if not numbers or numbers[0].device.type == "cpu":
        return numbers
    parts = torch.cat([x.flatten() for x in numbers]).cpu().split([x.numel() for x in numbers])
    return [part.view(x.shape) for part, x in zip(parts, numbers)]
