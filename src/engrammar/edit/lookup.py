"""Which keys occur in a pass, what they write at once, and which stay armed. It depends on token ids alone.

Letters: B batch, T tokens of the pass, S positions of history, P = S + T positions, K the longest key, C candidates.
"""

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from engrammar.edit.exact import NOTHING, ExactTable, Ints
from engrammar.edit.stack import Stack

NONE = np.empty(0, np.int64)
MOST_ARMED = 4  # subjects that are armed at once, the nearest ones


@final
@dataclass(frozen=True, kw_only=True)
class Text:
    """The ids of a pass and what stands before them."""

    ids_BP: Ints  # -1 where masked or missing; the last T are the pass's own
    start_BP: Ints  # where the text of each position begins in its row: after padding, or with its document
    num_new: int  # T

    @property
    def first_BT(self) -> NDArray[np.bool_]:
        """True where nothing stands before a token, and at padding: nothing is added there."""
        return (self.start_BP >= np.arange(self.ids_BP.shape[1]))[:, -self.num_new :]


def text_of(ids_BT: Ints, history_BS: Ints, starts_BT: NDArray[np.bool_] | None) -> Text:
    """The text of a pass.

    Args:
        ids_BT, history_BS: ids, -1 where masked or missing.
        starts_BT: True where a packed document begins; None if the rows are not packed.
    """
    ids_BP = np.concatenate([history_BS, ids_BT], axis=1)
    place_P = np.arange(ids_BP.shape[1])
    begins_BP = np.where(ids_BP < 0, place_P + 1, 0)
    if starts_BT is not None:
        begins_BP[:, history_BS.shape[1] :] = np.maximum(
            begins_BP[:, history_BS.shape[1] :], starts_BT * place_P[history_BS.shape[1] :]
        )
    return Text(ids_BP=ids_BP, start_BP=np.maximum.accumulate(begins_BP, axis=1), num_new=ids_BT.shape[1])


def find_keys(table: ExactTable, classes_V: NDArray[np.int32], text: Text) -> Ints:
    """The longest key that ends at each token of the pass, [B, T], -1 for none.

    The text's history must be as long as the longest key without its last class.
    """
    num_rows, num_places = text.ids_BP.shape
    place_TK = np.arange(num_places - text.num_new, num_places)[:, None] - np.arange(table.longest - 1, -1, -1)
    ids_BTK = text.ids_BP[:, place_TK]
    is_known = (place_TK >= text.start_BP[:, -text.num_new :, None]) & (ids_BTK < len(classes_V))
    windows_BTK = np.where(is_known, classes_V[np.where(is_known, ids_BTK, 0)], NOTHING)
    return table.find(windows_BTK.reshape(-1, table.longest)).reshape(num_rows, text.num_new)


@final
@dataclass(frozen=True, kw_only=True)
class Writes:
    """Steps to be written, each at a token of the pass: rows of the batch, tokens, entries, steps of the entries."""

    row: Ints
    token: Ints
    entry: Ints
    step: Ints


def direct_writes(stack: Stack, text: Text, found_BP: Ints) -> Writes:
    """What entries without a probe write. Their step j is written j tokens after the key if it said the j before.

    Args:
        found_BP: `find_keys` of all positions of the text, as far as they are known, else -1.
    """
    entries, starts = stack.direct
    first_new = text.ids_BP.shape[1] - text.num_new
    parts = [[NONE] * 4]
    for step in range(stack.num_direct_steps):
        low = max(first_new - step, 0)
        row, place = np.nonzero(found_BP[:, low : found_BP.shape[1] - step] >= 0)
        place = place + low
        one, entry = _expand(entries, starts, found_BP[row, place])
        row, place = row[one], place[one]
        fits = (stack.columns["num_steps"][entry] > step) & (place >= text.start_BP[row, place + step])
        for said in range(step):
            index = np.minimum(stack.columns["first_step"][entry] + said, len(stack.steps) - 1)
            fits &= stack.steps[index, 1] == text.ids_BP[row, place + said + 1]
        token = place + step - first_new
        fits &= ~text.first_BT[row, token]
        parts.append([row[fits], token[fits], entry[fits], np.full(int(fits.sum()), step)])
    row, token, entry, steps = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Writes(row=row, token=token, entry=entry, step=steps)


NO_WRITES = Writes(row=NONE, token=NONE, entry=NONE, step=NONE)


@final
@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Entries that are armed at a token of a row of the pass, the nearest key first; [C] each."""

    row: Ints
    token: Ints
    entry: Ints
    place: Ints  # the position in the text where its key ended


NO_CANDIDATES = Candidates(row=NONE, token=NONE, entry=NONE, place=NONE)


def candidates(stack: Stack, text: Text, found_BP: Ints) -> Candidates:
    """The entries with a probe that are armed at each token, for up to `MOST_ARMED` keys before it.

    A key that ends inside a longer one, such as "York" after "New", is not a subject of its own. Entries may be
    armed only up to the first id after their key that begins another name, and only at one id.
    """
    entries, starts = stack.gated
    first_new = text.ids_BP.shape[1] - text.num_new
    last_BP = np.maximum.accumulate(np.where(found_BP >= 0, np.arange(found_BP.shape[1]), -1), axis=1)
    row, token = np.nonzero(~text.first_BT & (last_BP[:, first_new:] >= 0))
    place = last_BP[row, first_new + token]
    named_BP = _names_so_far(stack, text)
    parts = [[NONE] * 4]
    for _ in range(MOST_ARMED):
        age = first_new + token - place
        near = (place >= text.start_BP[row, first_new + token]) & (age <= stack.num_armed) & (place >= 0)
        row, token, place = row[near], token[near], place[near]
        if not len(row):
            break
        key = found_BP[row, place]
        one, entry = _expand(entries, starts, key)
        armed = stack.columns["armed"][entry] >= (first_new + token - place)[one]
        is_last_name = named_BP[row, first_new + token] == named_BP[row, place]
        armed &= is_last_name[one] | (stack.columns["until_name"][entry] == 0)
        after = stack.columns["after"][entry]
        armed &= (after < 0) | (after == text.ids_BP[row, first_new + token][one])
        parts.append([row[one][armed], token[one][armed], entry[armed], place[one][armed]])
        before = place - stack.lengths_Q[key]
        place = np.where(before >= 0, last_BP[row, np.maximum(before, 0)], -1)
    row, token, entry, place = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Candidates(row=row, token=token, entry=entry, place=place)


def _names_so_far(stack: Stack, text: Text) -> Ints:
    """How many ids up to each position begin a name, [B, P]."""
    num_ids = len(stack.names_V)
    is_known = (text.ids_BP >= 0) & (text.ids_BP < num_ids)
    is_name = is_known & stack.names_V[np.where(is_known, text.ids_BP, 0)] if num_ids else np.zeros_like(is_known)
    return np.cumsum(is_name, axis=1)


def _expand(entries: Ints, starts: Ints, keys: Ints) -> tuple[Ints, Ints]:
    """All entries of each key: the index of the key in `keys`, and the entry."""
    count = starts[keys + 1] - starts[keys]
    one = np.repeat(np.arange(len(keys)), count)
    within = np.arange(len(one)) - np.repeat(np.cumsum(count) - count, count)
    return one, entries[starts[keys][one] + within]
