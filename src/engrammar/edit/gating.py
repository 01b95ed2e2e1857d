"""Which armed entries are written: probes and bindings are read off the hidden state, then writes follow each other.

Letters: B batch, T tokens, H positions of history, C candidates, D hidden width.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engrammar.edit.exact import Ints
from engrammar.edit.lookup import Candidates, Text, Writes
from engrammar.edit.rows import ReadRows
from engrammar.edit.stack import Stack

CODES = 32  # a write is kept as CODES * entry + step; the step after the last means that the object was said
NO_WRITE = -1


@torch.no_grad()
def margins(stack: Stack, candidates: Candidates, block: int, streams_BTMD: Tensor, rows: ReadRows) -> Tensor:
    """How far the probe of each candidate is above its threshold, [C] on the CPU; NaN where it is not at this block.

    It is minus infinity where the candidate's binding is closed.
    """
    found_C = torch.full((len(candidates.entry),), torch.nan)
    probe_C = stack.columns["probe"][candidates.entry]
    (here,) = np.nonzero(stack.probe_blocks[probe_C] == block)
    if not len(here):
        return found_C
    device = streams_BTMD.device
    entry, probe = candidates.entry[here], probe_C[here]
    hidden_CD = streams_BTMD[_to(candidates.row[here], device), _to(candidates.token[here], device)].float().mean(1)
    pairs_C2D = stack.probes_P2D[_to(probe, stack.probes_P2D.device)].to(device)
    unit_CD = F.normalize(hidden_CD - pairs_C2D[:, 0], dim=-1)
    score_C = (unit_CD * pairs_C2D[:, 1]).sum(-1).cpu() - stack.thresholds_P[torch.from_numpy(probe)]
    (bound,) = np.nonzero(stack.columns["binding"][entry] >= 0)
    if len(bound):
        direction_CD = rows.values(stack.columns["binding"][entry[bound]], device)
        binding_C = (unit_CD[_to(bound, device)] * direction_CD).sum(-1).cpu()
        is_open = binding_C > torch.from_numpy(stack.strengths[entry[bound], 1])
        score_C[torch.from_numpy(bound)] = score_C[torch.from_numpy(bound)].where(is_open, -torch.inf)
    found_C[torch.from_numpy(here)] = score_C
    return found_C


def _to(numbers: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers).to(device)


def decide(
    stack: Stack, text: Text, candidates: Candidates, margin_C: NDArray[np.float32], codes_BH: Ints
) -> tuple[Writes, Ints]:
    """Follows each row of the batch token by token, where something is open or under way.

    A write that is under way goes on while the tokens that it says come. Else the nearest candidate that is open
    begins; of several entries of one key, the one that is the furthest above its threshold.

    Args:
        codes_BH: the codes of the positions before the pass, as far as they are known.

    Returns:
        The writes, and the codes of the pass [B, T].
    """
    num_rows, num_new = text.ids_BP.shape[0], text.num_new
    opened = _opened(candidates, margin_C)
    codes_BT = np.full((num_rows, num_new), NO_WRITE)
    for row in range(num_rows):
        if row in opened or (codes_BH[row] != NO_WRITE).any():
            codes_BT[row] = _follow(stack, text, row, opened.get(row, {}), codes_BH[row])
    rows, tokens = np.nonzero(codes_BT != NO_WRITE)
    entry, step = np.divmod(codes_BT[rows, tokens], CODES)
    unsaid = step < stack.columns["num_steps"][entry]
    writes = Writes(row=rows[unsaid], token=tokens[unsaid], entry=entry[unsaid], step=step[unsaid])
    return writes, codes_BT


Opened = Mapping[int, list[tuple[int, int]]]  # of a row: by token, place and entry of each open candidate, best first


def _opened(candidates: Candidates, margin_C: NDArray[np.float32]) -> dict[int, dict[int, list[tuple[int, int]]]]:
    (is_open,) = np.nonzero(margin_C > 0)
    place, entry = candidates.place[is_open], candidates.entry[is_open]
    order = np.lexsort((entry, -margin_C[is_open], -place))
    opened: dict[int, dict[int, list[tuple[int, int]]]] = {}
    for index in order:
        tokens = opened.setdefault(int(candidates.row[is_open[index]]), {})
        token = int(candidates.token[is_open[index]])
        tokens.setdefault(token, []).append((int(place[index]), int(entry[index])))
    return opened


def _follow(stack: Stack, text: Text, row: int, opened: Opened, codes_H: Ints) -> list[int]:
    """The codes [T] of one row."""
    first_new = text.ids_BP.shape[1] - text.num_new
    num_steps, first_step, fact = (stack.columns[name] for name in ("num_steps", "first_step", "fact"))
    said: dict[int, int] = {}  # the position at which the object of a fact was last said
    for place, code in enumerate(codes_H.tolist(), start=first_new - len(codes_H)):
        if code != NO_WRITE and code % CODES == num_steps[code // CODES]:
            said[int(fact[code // CODES])] = place
    before = int(codes_H[-1]) if len(codes_H) else NO_WRITE
    codes = []
    for token in range(text.num_new):
        place, code = first_new + token, NO_WRITE
        entry, step = divmod(before, CODES)
        is_under_way = before != NO_WRITE and step < num_steps[entry] and text.start_BP[row, place] < place
        if is_under_way and stack.steps[first_step[entry] + step, 1] == text.ids_BP[row, place]:
            code = before + 1
            if step + 1 == num_steps[entry]:
                said[int(fact[entry])] = place
        else:
            armed = (entry for since, entry in opened.get(token, ()) if said.get(int(fact[entry]), -1) < since)
            code = next((entry * CODES for entry in armed), NO_WRITE)
        codes.append(code)
        before = code
    return codes
