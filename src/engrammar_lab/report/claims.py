"""The paper's own orderings (its allocation curve, ablation and placement), tested by the lab's runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engrammar_lab.report.parts import interval, listed
from engrammar_lab.report.statistics import compare


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The paper found `better` to have a lower loss than `worse`, and may say by how many nats per token."""

    better: str
    worse: str
    nats: float | None = None


CLAIMS: Mapping[str, tuple[Claim, ...]] = {
    "allocation": (Claim(better="80%", worse="100%", nats=0.0139), Claim(better="80%", worse="40%")),
    "ablation": (
        Claim(better="whole", worse="without", nats=0.040),
        Claim(better="whole", worse="no compression", nats=0.0057),
        Claim(better="whole", worse="no convolution", nats=0.0005),
        Claim(better="whole", worse="4-grams too", nats=0.0017),
    ),
    "gate": (Claim(better="gate", worse="no gate", nats=0.0045),),
    "branches": (Claim(better="a key for each", worse="one key for both", nats=0.0064),),
    "placement": (
        *(Claim(better="1", worse=block) for block in ("0", "2", "3")),
        Claim(better="1,3", worse="1"),
    ),
}


def claims_words(
    claims: Sequence[Claim], complete: Mapping[str, Sequence[float]], factor: float | None, *, short: bool = False
) -> str:
    """What runs say of the paper's orderings, tested together; an empty string if none can be tested.

    Args:
        complete: bits per byte of each point, seed by seed.
        factor: nats per token of one bit per byte, if known.
        short: give only the counts.
    """
    known = [claim for claim in claims if claim.better in complete and claim.worse in complete]
    if not known:
        return ""
    found = compare({claim: (complete[claim.worse], complete[claim.better]) for claim in known})
    sides: dict[str, list[str]] = {"confirmed": [], "open": [], "contradicted": []}
    for claim, own in found.items():
        side = "open" if not own.settled else "confirmed" if own.mean > 0 else "contradicted"
        words = f"“{claim.better}” over “{claim.worse}” ({interval(own)}"
        if claim.nats is not None:
            here = "" if factor is None else f"{own.mean * factor:+.4f} nats here, "
            words += f"; {here}{claim.nats:+.4f} nats in the paper"
        sides[side].append(f"{words})")
    if short:
        counts = [f"{len(sides[side])} {side}" for side in sides if sides[side]]
        return f"of the paper's orderings {listed(counts)}"
    told = " ".join(f"{side.capitalize()}: {listed(words)}." for side, words in sides.items() if words)
    return f"What the paper found better, tested here, with the gain in bits per byte. {told}"
