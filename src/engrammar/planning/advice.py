"""Which share of a model's idle parameters to make memory: what measurements say, and how far they reach.

Idle parameters are those that a token does not use: experts that it is not sent to, and rows that it does not read.
What was measured is in `advice.json`, which `engrammar lab advice` writes from the study `horizon`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

PAPER = "The paper (3.8B active parameters, 11 tokens per idle parameter): 20 to 25 % memory, flat from 5 to 40 %."
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
NEAR = math.log(2)  # lengths within this factor of one that was measured count as measured


@dataclass(frozen=True, kw_only=True)
class MeasuredLength:
    """One length of training of the study."""

    tokens: int
    # Memory's share of the idle parameters, in percent, of the best point; None if experts alone were best.
    memory: float | None
    as_good: tuple[float, ...]  # the shares that the seeds do not separate from the best one, the best included
    # Bits per byte that the best share gains over experts alone, and half of its 95 % interval (None: one seed has
    # none).
    gain: tuple[float, float | None]
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the study found, by length."""

    date: str
    idle: int
    active: int
    lengths: tuple[MeasuredLength, ...]


def read_measured() -> Measured:
    """What ships with the package."""
    return measured_of(json.loads((resources.files("engrammar.planning") / "advice.json").read_text()))


def measured_of(content: Mapping[str, Any]) -> Measured:
    lengths = tuple(
        MeasuredLength(**{**own, "as_good": tuple(own["as_good"]), "gain": tuple(own["gain"])})
        for own in content["lengths"]
    )
    return Measured(date=content["date"], idle=content["idle"], active=content["active"], lengths=lengths)


def number(text: str) -> float:
    """ "10B" -> 1e10; units are k, M, B and T. Raises a ValueError if it is no positive number with such a unit."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kmbt]?)", text.strip().casefold().replace(",", ""))
    try:
        value = float(match[1]) * UNITS[match[2]] if match else 0.0
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"{text!r} is no number of tokens or parameters: write 10B, 262e9 or 500M.")
    return value


def advise(tokens: float, idle: float, measured: Measured) -> str:
    """What the measurements support for `idle` parameters trained on `tokens`, and how sure that is, in words."""
    ratio = tokens / idle
    lines = [f"{ratio:.3g} tokens per idle parameter. Measured at {measured.active / 1e6:.2f}M active parameters:", ""]
    for own in measured.lengths:
        best = "experts alone are best" if own.memory is None else f"best with {own.memory:.0f} % memory"
        shares = ", ".join(f"{share:.0f}" for share in own.as_good)
        gain = f"{own.gain[0]:+.4f}" + ("" if own.gain[1] is None else f" ± {own.gain[1]:.4f}")
        lines.append(
            f"  {own.tokens / measured.idle:5.1f} tokens per idle parameter: {best} (not told apart: {shares} %), "
            f"{gain} bits per byte against experts alone, seeds: {own.seeds}"
        )
    lines += ["", f"  {PAPER}", "", _words(ratio, idle, measured)]
    return "\n".join(lines)


def _words(ratio: float, idle: float, measured: Measured) -> str:
    """The advice, and how far away the nearest measurement is."""
    apart = {own: abs(math.log(ratio * measured.idle / own.tokens)) for own in measured.lengths}
    nearest = min(measured.lengths, key=lambda own: apart[own])
    share = f"{min(nearest.as_good):.0f} to {max(nearest.as_good):.0f} % memory"
    if len(nearest.as_good) == 1:
        share = f"{nearest.as_good[0]:.0f} % memory"
    words = f"The nearest measurement supports {share}."
    larger = idle / measured.idle
    sure = []
    if larger > 2:
        sure.append(f"your model has {larger:,.0f} times the idle parameters of the one that was measured")
    if apart[nearest] > NEAR:
        longer = "longer" if ratio * measured.idle > nearest.tokens else "shorter"
        sure.append(f"your training is {math.exp(apart[nearest]):,.1f} times {longer} than the nearest one measured")
    if nearest.seeds < 3:
        sure.append(f"it has {nearest.seeds} seed{'s' if nearest.seeds > 1 else ''}")
    if not sure:
        return f"{words} It is of a model of about this size and length."
    return (
        f"{words} It is weak evidence: {'; '.join(sure)}. Train two shares at a tenth of your size before you choose."
    )
