"""Fits the probe of a relation: prompts that ask it against all that may be asked of its subjects otherwise.

What else may be asked comes from common relations in several phrasings (`phrasings`), whose states are read once. They
also tell which of them the facts ask, so that other phrasings of it count as asking too. What the model itself goes on
with after the others asks nothing.
Letters: N prompts, J tokens after a prompt, D hidden width, R relations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from engrammar.edit.forms import Form
from engrammar.edit.patch import MOST_ARMED
from engrammar.edit.phrasings import NAMES, NUM_OTHER, RELATIONS, about
from engrammar.edit.ranges import require_most, require_range

Units = Callable[[Sequence[str]], Tensor]  # prompts -> centred hidden states of length 1 at their ends, [N, D]
Later = Callable[[Sequence[str]], Tensor]  # prompts -> the same where the model goes on after them, [N, J, D]


@dataclass(frozen=True, kw_only=True)
class GatedSettings:
    """How probes are fitted and facts are written.

    Attributes:
        ridge: of the regressions.
        match_above: what a classifier must say of a fact's prompts to be their relation.
        alike_above: what it must say to leave its relation out of what else may be asked.
        opens_wrongly: the share of other prompts, kept apart from the fit, that may open a probe.
        at_most_wrongly: the share of the nearest other prompts of its subjects up to which a threshold may be lowered,
            to let the facts' own prompts in.
        num_worded: tokens that the model goes on with after a sentence of another relation, where it is not asked
            either; 0: none are read.
        probe_depth: where probes read, as a share of the depth. Early blocks confuse relations.
        armed: tokens after the subject in which the probe may open, if no other name comes before; in a chat, what
            the template puts before the answer is not counted.
        strength: the size of a write, in norms of the hidden state before the final norm.
    """

    ridge: float = 5e-3
    match_above: float = 0.1
    alike_above: float = -0.2
    opens_wrongly: float = 0.06
    at_most_wrongly: float = 0.2
    num_worded: int = 6
    probe_depth: float = 0.93
    armed: int = 16
    strength: float = 1.0

    def __post_init__(self) -> None:
        require_range(self, "over 0", "ridge", "strength")
        require_range(self, "a number", "match_above", "alike_above")
        require_range(self, "0 to 1", "opens_wrongly", "at_most_wrongly")
        require_range(self, "over 0, up to 1", "probe_depth")
        require_most(self, 64, "num_worded")
        require_most(self, MOST_ARMED // 2, "armed", least=1)  # a chat's template comes on top of it


@dataclass(frozen=True, kw_only=True)
class Match:
    """Which relation of `RELATIONS` facts ask (None: none of them), and which others may be meant as well."""

    relation: int | None
    alike: tuple[int, ...]

    @property
    def phrasings(self) -> tuple[str, ...]:
        return () if self.relation is None else RELATIONS[self.relation].phrasings

    @property
    def kinds(self) -> str:
        return "plt" if self.relation is None else RELATIONS[self.relation].kinds


@final
class Bank:
    """The states of all phrasings of a form, each with a name that the model does not know."""

    def __init__(self, units: Units, later: Later | None, settings: GatedSettings, form: Form) -> None:
        self.settings = settings
        self.texts = [text for relation in RELATIONS for text in relation.phrasings if form.fits(text)]
        number = {text: index for index, text in enumerate(self.texts)}
        asked = [
            (index, text, kind)
            for index, relation in enumerate(RELATIONS)
            for text in relation.phrasings
            if form.fits(text)
            for kind in relation.kinds
        ]
        prompts = [about(text, NAMES[kind]) for _, text, kind in asked]
        self.units_ND = units(prompts)
        self.later_NJD = self.units_ND[:, None][:, :0] if later is None else later(prompts)
        self.relation_N = torch.tensor([index for index, *_ in asked])  # which one a prompt asks
        self.phrasing_N = torch.tensor([number[text] for _, text, _ in asked])  # which of `texts` it is
        self.classifiers_RD = torch.stack([self._classifier(index) for index in range(len(RELATIONS) - NUM_OTHER)])

    def _classifier(self, relation: int) -> Tensor:
        is_own_N = self.relation_N == relation
        if not is_own_N.any():  # it has no phrasing of this form
            return torch.tensor([0.0] * self.units_ND.shape[1] + [-torch.inf])
        return ridge([self.units_ND[is_own_N], self.units_ND[~is_own_N]], self.settings.ridge)

    def match(self, asks_ND: Tensor, named_KD: Tensor) -> Match:
        """Which relation prompts ask, by one linear classifier for each.

        Args:
            asks_ND: the prompts.
            named_KD: the same with each of `NAMES` as the subject, which says more clearly what is asked.
        """
        fits_KR = torch.tensor([[kind in one.kinds for one in RELATIONS[:-NUM_OTHER]] for kind in NAMES])
        named_R = torch.where(fits_KR, with_one(named_KD) @ self.classifiers_RD.T, -torch.inf).amax(0)
        score_R = ((with_one(asks_ND) @ self.classifiers_RD.T).mean(0) + named_R) / 2
        best = int(score_R.argmax())
        alike = (score_R > self.settings.alike_above).nonzero()[:, 0].tolist()
        found = best if float(score_R[best]) > self.settings.match_above else None
        return Match(relation=found, alike=tuple(one for one in alike if one != found))

    def is_other(self, match: Match) -> Tensor:
        """Which prompts ask something else, [N]."""
        left_out = [*match.alike, *(() if match.relation is None else (match.relation,))]
        return ~torch.isin(self.relation_N, torch.tensor(left_out, dtype=torch.long))

    def hardest(self, match: Match, direction_D: Tensor, num: int) -> list[str]:
        """The phrasings of other relations, of the same kinds of subject, that come nearest to opening a probe."""
        score_N = torch.where(self.is_other(match), self.units_ND @ direction_D, -torch.inf)
        found: dict[str, None] = {}
        for index in score_N.argsort(descending=True).tolist():
            of = RELATIONS[int(self.relation_N[index])]
            if score_N[index] > -torch.inf and set(of.kinds) & set(match.kinds):
                found[self.texts[int(self.phrasing_N[index])]] = None
        spread = list(found)[num - num // 3 :]
        return [*list(found)[: num - num // 3], *spread[:: max(len(spread) // max(num // 3, 1), 1)][: num // 3]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Prompts of one relation's facts, as units."""

    own_FND: Tensor  # the facts' own prompts; every other one is kept apart from the fit
    asks_ND: Tensor  # others that ask the same
    others_ND: Tensor  # prompts that ask other things of the same subjects
    plain_ND: Tensor  # plain text, and prompts of other forms


def fit_probe(bank: Bank, match: Match, asked: Asked) -> tuple[Tensor, float]:
    """The direction and the threshold of a probe.

    The threshold is where a small share of other prompts would open it, each scored by a fit that has not seen it. It
    is lowered to let the facts' own prompts in, as far as that opens it for few others; never so far that half of the
    nearest ones open it.
    """
    settings = bank.settings
    is_other_N = bank.is_other(match)
    bank_ND, odd_N = bank.units_ND[is_other_N], bank.phrasing_N[is_other_N] % 2 == 1
    later_NJD = bank.later_NJD[is_other_N]
    asks = [asked.own_FND[:, ::2].flatten(0, 1), asked.asks_ND]
    if match.relation is not None:
        asks.append(bank.units_ND[bank.relation_N == match.relation])
    asks_ND = torch.cat(asks)
    odd_M = torch.arange(len(asked.others_ND)) % 2 == 1

    def fit(of_bank: Tensor, of_others: Tensor, of_later: Tensor) -> Tensor:
        groups = [asks_ND, torch.cat([of_bank, asked.plain_ND]), of_others, of_later.flatten(0, 1)]
        return ridge(groups, settings.ridge)[:-1]

    direction_D = fit(bank_ND, asked.others_ND, later_NJD)
    scores, own_scores = [], []
    for odd in (True, False):  # fitted on one half, scored on the other
        half_D = fit(bank_ND[odd_N != odd], asked.others_ND[odd_M != odd], later_NJD[odd_N != odd])
        scores.append(bank_ND[odd_N == odd] @ half_D)
        own_scores.append(asked.others_ND[odd_M == odd] @ half_D)
    others = torch.cat(own_scores) if len(asked.others_ND) else torch.cat(scores)
    threshold = float(torch.quantile(torch.cat(scores), 1 - settings.opens_wrongly))
    lowest, middling = (float(torch.quantile(others, 1 - share)) for share in (settings.at_most_wrongly, 0.5))
    reached = float(torch.quantile((asked.own_FND @ direction_D).amin(1), 0.02)) - MARGIN
    return direction_D, max(min(threshold, max(lowest, reached)), middling)


MARGIN = 0.02  # of a score, whose range is about -1 to 1


def with_one(units_ND: Tensor) -> Tensor:
    """A one behind the numbers of each state, for the constant of a regression."""
    return F.pad(units_ND, (0, 1), value=1.0)


def ridge(groups: Sequence[Tensor], strength: float) -> Tensor:
    """Ridge regression to +1 for the first group and -1 for the others, each group weighing the same; [D+1]."""
    groups = [one for one in groups if len(one)]
    rows = with_one(torch.cat(groups))
    signs = torch.cat([torch.full((len(one),), 1.0 if one is groups[0] else -1.0) for one in groups])
    weighted = rows * torch.cat([torch.full((len(one), 1), 1 / len(one)) for one in groups])
    return torch.linalg.solve(rows.T @ weighted + strength * torch.eye(rows.shape[1]), weighted.T @ signs)
