"""How many distinct rows the tokens of one rank's step touch, measured on a corpus.

Letters: T tokens of the sample, H columns, L tokens of a sequence.
"""

import json
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Self

import numpy as np

from engrammar.planning.plan import Addresses
from engrammar.planning.touches import Sample, num_distinct, touched_rows

MOST_STEPS = 16  # steps that are counted for one number of tokens


@dataclass(frozen=True, kw_only=True)
class DistinctRows:
    """The share of a step's rows that are distinct, by the number of tokens that a rank reads in the step."""

    model: str  # the preset or folder whose addresses were counted
    corpus: str
    sequence: int  # tokens of a sequence; a step is made of sequences drawn from all of the sample
    tokens: tuple[int, ...]  # numbers of tokens, ascending
    shares: tuple[float, ...]  # for each, the distinct rows divided by tokens * columns, in the first memory layer

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.shares) or sorted(set(self.tokens)) != list(self.tokens):
            raise ValueError("Distinct rows need as many shares as numbers of tokens, and these ascending.")

    def share(self, tokens: int) -> float:
        """The share at `tokens`, between two that were counted linear in the logarithm of tokens.

        Raises:
            ValueError: `tokens` is outside of what was counted.
        """
        if not self.tokens[0] <= tokens <= self.tokens[-1]:
            raise ValueError(
                f"Distinct rows were counted from {self.tokens[0]:,} to {self.tokens[-1]:,} tokens a rank, not at "
                f"{tokens:,}: count them there with `engrammar plan rows`."
            )
        return float(np.interp(np.log(tokens), np.log(self.tokens), self.shares))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads what `write` wrote; raises a ValueError if the file cannot be read, or is none of these."""
        try:
            content = json.loads(path.read_text())
            chosen = {field.name: content[field.name] for field in fields(cls)}
            return cls(**{**chosen, "tokens": tuple(chosen["tokens"]), "shares": tuple(chosen["shares"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} holds no distinct rows ({error}): write it with `engrammar plan rows`."
            ) from error

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def measured_for(model: str) -> DistinctRows:
    """What ships with the package for the paper's presets; raises a ValueError for other models."""
    path = resources.files("engrammar.planning") / "distinct" / f"{model}.json"
    if not path.is_file():
        raise ValueError(
            f"No distinct rows were counted for {model}: count them with `engrammar plan rows {model} CORPUS`, and "
            "give the file with --rows."
        )
    with resources.as_file(path) as file:
        return DistinctRows.read(file)


def count_distinct(
    addresses: Addresses, sample: Sample, *, tokens: tuple[int, ...], sequence: int, names: tuple[str, str]
) -> DistinctRows:
    """Counts the distinct rows of steps made of sequences in a random order, the mean over up to 16 steps.

    Args:
        tokens: numbers of tokens that a rank reads in a step.
        sequence: tokens of a sequence.
        names: the model's and the corpus's, for the record.

    Raises:
        ValueError: the sample has fewer tokens than a step, or a step is no number of whole sequences.
    """
    rows_TH = touched_rows(sample, addresses.memory, addresses.geometry, addresses.classes_V, 0)
    num_sequences = len(rows_TH) // sequence
    for wanted in tokens:
        if wanted % sequence or wanted < sequence:
            raise ValueError(f"{wanted:,} tokens are not whole sequences of {sequence}: choose a multiple.")
        if wanted > num_sequences * sequence:
            raise ValueError(
                f"{names[1]} has {len(rows_TH):,} tokens, fewer than a step of {wanted:,}: give more text, or count "
                "fewer tokens a rank."
            )
    order = np.random.default_rng(0).permutation(num_sequences)
    shuffled = rows_TH[: num_sequences * sequence].reshape(num_sequences, sequence, -1)[order]
    shares = []
    for wanted in tokens:
        per_step = wanted // sequence
        num_steps = min(MOST_STEPS, num_sequences // per_step)
        steps = [shuffled[step * per_step : (step + 1) * per_step] for step in range(num_steps)]
        shares.append(float(np.mean([num_distinct(step) / step.size for step in steps])))
    return DistinctRows(model=names[0], corpus=names[1], sequence=sequence, tokens=tokens, shares=tuple(shares))
