"""The lab's questions. Each is a handful of settings over a recipe, at the size of a laptop or of one GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question."""

    question: str  # the question as the report words it
    axis: str  # what changes from point to point
    # Settings of each point over the scale's recipe (`section.setting=value`). The other points are compared with the
    # first.
    points: Mapping[str, tuple[str, ...]]
    paper: str  # what the paper found
    equal: bool = True  # whether all points must have the same total and active parameters
    common: tuple[str, ...] = ()  # settings that all points share
    exempt: tuple[str, ...] = ()  # points that have fewer parameters on purpose
    recipe: str | None = None  # the recipe that the points change, if it is not the scale's


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The points of the studies at one model size."""

    recipe: str  # the recipe that every point changes
    rows: tuple[int, ...]  # rows per head of the points of `scaling`
    row_width: int  # width of the rows of an order's heads side by side; a single head gets all of it
    depth: tuple[str, ...]  # settings of the backbone of `placement`
    # For each point of `placement`, the blocks that read the memory; the last point reads it twice, early and late.
    # The other points are compared with the first.
    blocks: tuple[str, ...]
    dense: tuple[str, ...]  # settings of the dense model that has the active parameters of the MoE
    pair: tuple[str, ...]  # settings of both models of `pair`


SCALES = {
    scale.recipe: scale
    for scale in (
        Scale(
            recipe="lab",
            rows=(500, 1_600, 5_000, 16_000, 50_000),
            row_width=32,
            depth=("model.settings.num_hidden_layers=4",),
            blocks=("1", "0", "2", "3", "1,3"),
            dense=("model.settings.first_k_dense_replace=3", "model.settings.intermediate_size=220"),
            pair=(
                "data.source=pocket:wiki+wordnet+gcide+stdlib",
                "data.keep_share=0.1",
                "data.validation_share=0.06",
                "data.vocab_size=2048",
                "model.settings.num_hidden_layers=6",
                "trainer.max_steps=1000",
            ),
        ),
        Scale(
            recipe="lab-100m",
            rows=(26_000, 82_000, 260_000, 820_000, 2_600_000),
            row_width=256,
            depth=(),
            blocks=("1", "0", "3", "5", "8", "11", "1,5"),
            dense=("model.settings.first_k_dense_replace=12", "model.settings.intermediate_size=2388"),
            pair=("data.keep_share=0.5", "data.validation_share=0.04", "trainer.max_steps=1600"),
        ),
    )
}


HORIZONS = {"2M": (500, 1.6e-2), "8M": (2_000, 1.6e-2), "32M": (8_000, 8e-3)}
"""Steps of 4,096 tokens, and the learning rate that the study `rates` chose."""
HORIZON_SHARES = (1.0, 0.85, 0.75, 0.55, 0.35, 0.10)
SWEPT = {"2M": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "8M": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "32M": (4e-3, 8e-3, 1.6e-2)}


def studies_at(scale: Scale) -> dict[str, Study]:
    """All studies at one size, by name."""
    horizon = _horizon(scale) if scale.recipe == "lab" else {}
    return _budgets(scale) | horizon | _parts(scale) | _choices()


def study_of(result: Mapping[str, Any]) -> Study:
    """The study that a result is of."""
    return studies_at(SCALES[result.get("scale", "lab")])[result["study"]]


def _rho(share: float) -> tuple[str, ...]:
    return ("model.memory=none",) if share == 1 else ("model.memory=budget", f"model.rho={share}")


def _rows(rows: int) -> tuple[str, ...]:
    return ("model.memory=preset", f"model.settings.memory.rows_per_head=[{rows},{rows}]")


def _rival(kind: str) -> tuple[str, ...]:
    return "model.memory=none", f"model.settings.rival.kind={kind}"


def _memory(**settings: Any) -> tuple[str, ...]:
    return tuple(f"model.settings.memory.{name}={value}" for name, value in settings.items())


def _budgets(scale: Scale) -> dict[str, Study]:
    """Studies of what a share of the parameters is worth as memory, and as other things."""
    return {
        "allocation": Study(
            question="Which share of the idle parameters should be memory?",
            axis="experts' share of the idle parameters",
            points={f"{share:.0%}": _rho(share) for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)},
            paper="best at 75 to 80 % experts, flat from 60 to 95 %",
        ),
        "scaling": Study(
            question="What do more rows buy on a fixed backbone?",
            axis="rows per head",
            points={f"{rows:,}": _rows(rows) for rows in scale.rows},
            equal=False,
            paper="about 0.028 nats less for ten times the rows, over 2.6e5 to 1e7 rows per head",
        ),
        "rivals": Study(
            question="Is a memory better than other ways to spend the same parameters?",
            axis="what a fifth of the idle parameters are",
            points={
                "memory": (),
                "experts": ("model.memory=none",),
                "OverEncoding": _rival("over_encoding"),
                "per-layer embeddings": _rival("per_layer"),
                "bigram at every layer": _rival("bigram"),
                "product keys": _rival("product_keys"),
                "nothing (dense)": ("model.memory=none", *scale.dense),
            },
            exempt=("nothing (dense)",),
            paper="no comparison but with experts",
        ),
        "pair": Study(
            question="What is left of the gain in a deeper model, trained longer on text that it sees twice?",
            axis="model",
            points={"MoE": ("model.memory=none",), "MoE + memory": ("model.rho=0.2",)},
            common=scale.pair,
            paper="1.7248 to 1.7109 nats at 6e20 FLOPs",
        ),
    }


def _horizon(scale: Scale) -> dict[str, Study]:
    """The allocation over training length, and the sweep that its learning rates come from."""
    return {
        "rates": Study(
            question="Which learning rate is best for each length of training, with experts and with memory?",
            axis="tokens, experts' share of the idle parameters, learning rate",
            points={
                f"{tokens}, {share:.0%}, {rate:g}": (*_rho(share), *_trained(tokens, rate))
                for tokens in HORIZONS
                for share in (HORIZON_SHARES[0], HORIZON_SHARES[-1])
                for rate in SWEPT[tokens]
            },
            paper="a rate of 4e-4 for all",
            recipe="horizon",
        ),
        "horizon": Study(
            question="Does the best share of memory depend on how long the model is trained?",
            axis="tokens, experts' share of the idle parameters",
            points={
                f"{tokens}, {name}": (*settings, *_trained(tokens, HORIZONS[tokens][1]))
                for tokens in HORIZONS
                for name, settings in (
                    *((f"{share:.0%}", _rho(share)) for share in HORIZON_SHARES),
                    ("bigram", _rival("bigram")),
                    ("dense", ("model.memory=none", *scale.dense)),
                )
            },
            exempt=tuple(f"{tokens}, dense" for tokens in HORIZONS),
            paper="75 to 80 % experts at 262B tokens, one length only",
            recipe="horizon",
        ),
    }


def _trained(tokens: str, rate: float) -> tuple[str, ...]:
    return f"trainer.max_steps={HORIZONS[tokens][0]}", f"optimizer.lr={rate}"


def _parts(scale: Scale) -> dict[str, Study]:
    """Studies of what each part of a memory is worth."""
    return {
        "ablation": Study(
            question="What does each part of the memory contribute?",
            axis="memory",
            points={
                "whole": (),
                "without": ("model.memory=none",),
                "gate without its root": _memory(gate="sigmoid"),
                "no compression": _memory(compression="none"),
                "no convolution": _memory(conv_kernel=0),
                "2-grams alone": _memory(max_ngram_size=2, rows_per_head="[1000]"),
                "4-grams too": _memory(max_ngram_size=4, rows_per_head="[1000,1000,1000]"),
                "one head": _memory(num_heads=1, head_dim=scale.row_width),
                "at the first block": _memory(layers="[0]"),
            },
            paper="every part helps, compression and gate more than the convolution; 4-grams do not",
        ),
        "gate": Study(
            question="Does the gate help, or does adding the value as it is do as well?",
            axis="memory",
            points={"gate": (), "no gate": _memory(gate="none")},
            paper="the gate is better",
        ),
        "branches": Study(
            question="Does each residual branch need a key of its own?",
            axis="keys of two residual branches",
            points={"a key for each": (), "one key for both": _memory(branch_keys="shared")},
            common=("model.settings.num_branches=2",),
            paper="a key for each is better",
        ),
        "placement": Study(
            question="Which blocks should read the memory?",
            axis="blocks that read it, counted from 0",
            points={blocks: _memory(layers=f"[{blocks}]") for blocks in scale.blocks},
            common=scale.depth,
            paper="one layer: best at the second block; two, early and late, are better still",
        ),
    }


def _choices() -> dict[str, Study]:
    """Studies of how to train a memory, and of which model's dialect to follow."""
    return {
        "optimizer": Study(
            question="Which optimizer trains the rows best?",
            axis="optimizer of the tables, its rate over the backbone's",
            points={
                f"{kind} x{rate}": (f"optimizer.memory={kind}", f"optimizer.memory_lr_scale={rate}")
                for kind, rates in (
                    ("row_adam", (5, 20)),
                    ("adam", (5, 20)),
                    ("dense_adam", (20,)),
                    ("sinkhorn", (5, 10)),
                )
                for rate in rates
            },
            paper="Adam, five times the backbone's rate, without decay",
        ),
        "dialects": Study(
            question="Which dialect is best at equal parameters?",
            axis="dialect",
            points={
                "paper": (),
                "demo": _memory(dialect="demo", boundary="row", end_ids="[]"),
                "deepseek_v41": _memory(
                    dialect="deepseek_v41",
                    max_ngram_size=4,
                    rows_per_head="[1000,1000,1000]",
                    boundary="dead",
                    dead_ids="[0]",
                    end_ids="[]",
                ),
                "qwen_next": _memory(dialect="qwen_next"),
            },
            paper="no comparison: the dialects are of three models",
        ),
        "boundary": Study(
            question="Should look-back stop where a packed document ends?",
            axis="what look-back never crosses",
            points={"end of text": (), "start of row": _memory(boundary="row", end_ids="[]")},
            paper="the demo stops at the start of a row only, Qwen at an end of text",
        ),
    }


STUDIES = studies_at(SCALES["lab"])
