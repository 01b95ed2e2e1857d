"""What a memory keeps of a sequence: the ids before the next token, and the window of each layer's convolution.

It is one more layer of the base model's own cache, so whatever is done to the cache is done to it: reordering for
beams, taking back rejected drafts, repeating, selecting and forgetting sequences.
Letters: B batch, T tokens, S positions of history (N-1), C channels.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from engrammar.versions import DummyLayer

CHUNK = 64  # positions that are joined into one tensor


@final
class Track:
    """The latest positions of something with one value per token, [B, ..., T].

    They are kept in pieces, so that a decoding step copies at most CHUNK positions.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.pieces: list[Tensor] = []

    def extend(self, new: Tensor, keep_all: bool) -> Tensor:
        """Appends `new` [B, ..., T]; returns it with up to `window` positions before it.

        Args:
            keep_all: whether positions out of the window are kept too, in case later ones are taken back.
        """
        before: list[Tensor] = []
        wanted = self.window
        for piece in reversed(self.pieces):
            if wanted <= 0:
                break
            before.insert(0, piece[..., -wanted:])
            wanted -= piece.shape[-1]
        with_past = torch.cat([*before, new], dim=-1) if before else new
        if not keep_all:
            self.pieces = [with_past[..., -self.window :].clone()]  # frees the rest
        elif self.pieces and self.pieces[-1].shape[-1] < CHUNK:
            self.pieces[-1] = torch.cat([self.pieces[-1], new], dim=-1)
        else:
            self.pieces.append(new)
        return with_past

    def latest(self) -> Tensor | None:
        """Up to `window` positions, the last ones; None if there are none."""
        kept = [piece for piece in self.pieces if piece.shape[-1]]
        return torch.cat(kept, dim=-1)[..., -self.window :] if kept else None

    def take_back(self, count: int) -> None:
        """Forgets the last `count` positions."""
        while count:
            last = self.pieces.pop()
            if last.shape[-1] > count:
                self.pieces.append(last[..., :-count])
            count -= min(count, last.shape[-1])

    def __len__(self) -> int:
        return sum(piece.shape[-1] for piece in self.pieces)


@final
class MemoryState(DummyLayer):
    """A cache layer without keys and values that holds the state of one named memory."""

    is_compileable = False  # so `generate` neither compiles the pass nor replaces the mask by one of four dimensions

    def __init__(self, name: str, config: Hashable, num_back: int, windows: Mapping[Any, int]) -> None:
        super().__init__()
        self.name = name
        self.config = config  # what the state belongs to; a state of another config is not continued
        self.seen = 0  # the number of positions whose ids it holds or has held
        self.record_past = False  # transformers' mark that positions may be taken back
        self.ids = Track(num_back)
        # Of other things than ids, by their names (of a convolution: its layer).
        self.windows = {key: Track(window) for key, window in windows.items()}

    def __repr__(self) -> str:
        return f"MemoryState({self.name!r}, seen={self.seen})"

    def tracks(self) -> list[Track]:
        return [self.ids, *self.windows.values()]

    def history(self, input_ids: Tensor, keep_all: bool) -> Tensor:
        """Appends ids [B, T], negative where they are masked; returns the N-1 before them, -1 where there are none."""
        num_back = self.ids.window
        with_past = self.ids.extend(input_ids, keep_all)
        self.seen += input_ids.shape[1]
        if missing := num_back + input_ids.shape[1] - with_past.shape[1]:
            with_past = F.pad(with_past, (missing, 0), value=-1)
        return with_past[:, :num_back]

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last positions; `tokens_to_remove` is negative, as in transformers."""
        count = -tokens_to_remove
        if count < 0:
            raise ValueError(f"crop was called with {tokens_to_remove}: give minus the number of tokens to take back.")
        if count > self.seen:
            raise ValueError(f"crop was called with {tokens_to_remove}, and the cache holds {self.seen} tokens.")
        tracks = [track for track in self.tracks() if len(track)]  # none of blocks that an early exit leaves out
        for track in tracks:
            if len(track) - count < min(track.window, self.seen - count):
                raise ValueError(
                    f"The memory {self.name!r} cannot take back {count} tokens: this cache did not record them. Call "
                    "cache.activate_past_recording() before the first pass."
                )
        self.seen -= count
        for track in tracks:
            track.take_back(count)

    def reset(self) -> None:
        self.seen = 0
        for track in self.tracks():
            track.pieces = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda piece: piece.index_select(0, beam_idx.to(piece.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda piece: piece.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda piece: piece[indices.to(piece.device)])

    def _change(self, each: Callable[[Tensor], Tensor]) -> None:
        for track in self.tracks():
            track.pieces = [each(piece) for piece in track.pieces]


def state_in(cache: Cache | None, name: str) -> MemoryState | None:
    """The state of the memory `name` in a cache; None if the cache has none."""
    layers = [] if cache is None else cache.layers
    return next((layer for layer in layers if isinstance(layer, MemoryState) and layer.name == name), None)


def positions_in(cache: Cache | None) -> int | None:
    """The number of positions that a cache holds; None if it cannot say, since it has no attention layer."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # transformers': there are only linear attention layers
        return None


def keeps_all(cache: Cache | None) -> bool:
    """Whether positions of a cache may be taken back, so that a memory's state has to keep them as well."""
    return cache is None or cache.is_croppable or any(getattr(layer, "record_past", False) for layer in cache.layers)
