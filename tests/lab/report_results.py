"""Made-up results for the report's tests, in the form that studies and instruments write."""

import io

import numpy as np
from PIL import Image

from engrammar_lab.adapters.variants import VARIANTS
from engrammar_lab.catalogue import HORIZONS, STUDIES
from engrammar_lab.report import figures
from engrammar_lab.report.editing import BESIDES, SHOWN

MACHINE = {"cpu": "a CPU", "cores": 2, "torch": "2"}
SEEDS = (0, 1, 2)
OPTIMA = {"2M": 30.0, "8M": 50.0, "32M": 70.0}  # where the made-up optimum lies, in percent of experts


def made(study, values, **more):
    """A study's result with these bits per byte per point, seed by seed."""
    return {
        "command": f"engrammar lab run {study}",
        "study": study,
        "date": "2026-11-24",
        "machine": MACHINE,
        "tokens": 1000,
        "runs": [
            {
                "point": point,
                "seed": seed,
                "bits_per_byte": value,
                "total_parameters": 1000,
                "active_parameters": 100 + (point == "40%"),
                "memory_rows": 5,
                "flops_per_token": 2e5,
                "tokens": 1000,
                "tokens_per_second": None,
                "curve": [[1, 5.0], [2, 4.0 + value / 10]],
            }
            for point, each in values.items()
            for seed, value in enumerate(each)
        ],
        **more,
    }


def blank_pictures(monkeypatch):
    """Pictures are laid out and drawn on, but not rendered: what takes time and only a few tests look at."""
    blank = io.BytesIO()
    Image.new("RGB", (72, 36)).save(blank, "png")
    monkeypatch.setattr(figures, "to_png", lambda figure: blank.getvalue())


def noisy(value, place=0, spread=0.002):
    """Three seeds around a value."""
    return [value + spread * np.sin(5 * seed + place) for seed in SEEDS]


def made_allocation(optimum=70.0):
    shares = {point: float(point.rstrip("%")) for point in STUDIES["allocation"].points}
    return made("allocation", {p: noisy(2 + 1e-5 * (x - optimum) ** 2, x, 1e-4) for p, x in shares.items()})


def made_scaling(law):
    rows = {point: float(point.replace(",", "")) for point in STUDIES["scaling"].points}
    return made("scaling", {p: [law(x) + 0.001 * seed for seed in SEEDS] for p, x in rows.items()})


def made_study(name):
    return made(name, {point: noisy(2 + 0.01 * (i % 3), i) for i, point in enumerate(STUDIES[name].points)})


def made_horizon(optima=OPTIMA, gains=(0.2, 0.1, 0.05), seeds=(3, 3, 3)):
    """Parabolas whose minimum lies `gains` below experts alone; a third seed is 1 % off."""
    values = {}
    for (tokens, optimum), gain, num in zip(optima.items(), gains, seeds):
        for point in (point for point in STUDIES["horizon"].points if point.startswith(f"{tokens}, ")):
            name = point.partition(", ")[2]
            at = {"100%": 0.0, "bigram": -gain / 2, "dense": gain}.get(name)
            each = []
            for seed in range(num):
                move = 1.0 if seed == 2 else 0.0
                bend = 2e-5 * (float(name.rstrip("%")) - optimum - move) ** 2 - gain if at is None else at
                each.append(2 + 0.01 * seed + bend)
            values[point] = each
    result = made("horizon", values)
    for run in result["runs"]:
        tokens, _, name = run["point"].partition(", ")
        run |= {"tokens": HORIZONS[tokens][0] * 4096, "tokens_per_second": 10_000}
        run["total_parameters"] = 500_000 if name == "dense" else 1_300_000
    return result


def made_tasks(gain=0.0):
    """Two groups; `gain` is what memory adds to facts; half of facts' and most of reading's score stays without it."""

    def task(chance, plain, memory, off):
        scores = {"MoE": noisy(plain), "MoE + memory": noisy(memory, 1), "MoE + memory, memory off": noisy(off, 2)}
        return {"measure": "choice", "chance": chance, "questions": 200, "scores": scores}

    return {
        "command": "engrammar lab tasks",
        "date": "2026-11-25",
        "machine": MACHINE,
        "points": ["MoE", "MoE + memory", "MoE + memory, memory off"],
        "seeds": list(SEEDS),
        "tasks": {
            "facts/choice/seen": task(0.25, 0.45, 0.45 + gain, 0.35 + gain / 2),
            "facts/cloze/seen": task(0.0, 0.004, 0.004, 0.004),
            "context/with": task(0.25, 0.65, 0.65, 0.63),
        },
    }


def made_depth(lower=0.5):
    """Three blocks; memory's KL is lower by `lower` nats after the first; each of its layers is most like the next."""
    plain = [4.0, 2.0, 1.0, 0.0]
    memory = [4.0, 2.0 - lower, 1.0, 0.0]
    cka = [[0.9 - 0.2 * abs(min(row + 1, 3) - column) for column in range(4)] for row in range(4)]
    return {
        "command": "engrammar lab depth",
        "date": "2026-11-24",
        "machine": MACHINE,
        "runs": [
            {
                "seed": seed,
                "logit_lens": {
                    "memory": [value + 0.01 * np.sin(seed + place) for place, value in enumerate(memory)],
                    "plain": [value + 0.01 * np.cos(seed + place) for place, value in enumerate(plain)],
                },
                "cka": cka,
                "alignment": {"k": 4, "index": [1.2, 1.6, 2.0, 2.1], "nearest": [1, 2, 3, 3]},
            }
            for seed in SEEDS
        ],
    }


def made_gates(rise=0.05):
    """Gates that open by `rise` for each bin and help by twice that."""

    def bins(seed):
        return [
            {
                "count_from": 0 if bits == 0 else 2 ** (bits - 1),
                "count_to": 2**bits - 1,
                "tokens": 1000 - 100 * bits,
                "gate": 0.2 + rise * bits + 0.001 * np.sin(seed + bits),
                "loss_on": 4.0 - 2 * rise * bits + 0.001 * np.cos(3 * seed + bits),
                "loss_off": 4.0,
                "loss_plain": 4.1,
            }
            for bits in range(5)
        ]

    text = {"tokens": [" the", " Great", " Wall"], "gates": {"1": [0.1, 0.5, 0.9]}}
    return {
        "command": "engrammar lab gates",
        "date": "2026-11-24",
        "machine": MACHINE,
        "texts": [text],
        "runs": [{"seed": seed, "tokens": 4000, "orders": {"2": bins(seed), "3": bins(seed)}} for seed in SEEDS],
    }


def made_traffic():
    order = {
        "distinct": 12_345, "ngrams_per_row": 6.1, "in_a_head": 0.97, "in_a_head_expected": 0.998,
        "in_all_heads": 0.9, "in_all_heads_expected": 0.95, "same_rows": 0.01, "same_rows_expected": 0.001,
        "tokens_in_a_head": 0.9, "tokens_in_all_heads": 0.8, "own_lookups": 0.4,
        "zipf": {"exponent": 0.91, "ranks": [10, 1234]},
    }  # fmt: skip
    layer = {
        "orders": {"2": order, "3": order | {"zipf": None}}, "rows": 4112, "untouched": 0.002,
        "hottest_1_percent": 0.12, "hottest_10_percent": 0.41, "zipf": None, "untouched_expected": 0.001,
        "distinct_rows_per_1000_tokens": 1234.5, "lookups_per_1000_tokens": 4000.0,
    }  # fmt: skip
    return {
        "command": "engrammar lab traffic",
        "date": "2026-11-24",
        "machine": MACHINE,
        "runs": [{"seed": seed, "tokens": 100_000, "layers": {"1": layer}} for seed in SEEDS],
    }


def made_horizon_tasks():
    """As `made_tasks`, seed by seed."""
    tasks = made_tasks(0.05)
    each = [
        {
            point: {
                name: {**task, "score": task["scores"][point][seed], "bits_per_byte": 1.0}
                for name, task in tasks["tasks"].items()
            }
            for point in tasks["points"]
        }
        for seed in SEEDS
    ]
    head = {name: tasks[name] for name in ("command", "date", "machine")}
    pair = ["32M, 100%", "32M, 10%"]
    runs = [{"seed": seed, "tasks": own} for seed, own in zip(SEEDS, each)]
    return head | {"study": "horizon", "pair": pair, "settings": {}, "runs": runs}


def made_attach(memory=0.6, seconds=0.2, chat=0.005):
    """Three seeds of two domains; recall and chat as given."""
    known = {"memory": memory, "LoRA, equal seconds": seconds, "memory and LoRA": memory + 0.1}
    runs = []
    for domain in ("computing", "encyclopaedia"):
        for seed in range(3):
            for variant in VARIANTS:
                recall = known.get(variant, 0.05)
                scores = {"facts/recall/seen": recall + 0.01 * seed, "taught/nats": 2.0, "held/nats": 3.0 - recall}
                scores |= {"chat/nats": 0.5 + (chat if variant == "memory" else 0.0) + 0.001 * seed}
                scores |= {"questions/piqa": 0.6, "trained": 10, "stored": 20, "seconds": 3.0, "tokens": 100}
                runs.append({"domain": domain, "seed": seed, "variant": variant, **scores})
    return {
        "command": "engrammar lab attach",
        "date": "2026-11-29",
        "machine": MACHINE,
        "base": "a model",
        "runs": runs,
    }


def made_forgetting():
    """Three seeds of the base and two ways, one of which did not learn the text once."""
    runs = []
    for seed in range(3):
        for way, chat in (("as it was", 0.85), ("memory", 0.95), ("LoRA", 1.4)):
            scores = {"taught/nats": 1.0, "facts/recall/seen": 0.2, "held/nats": 3.0, "other/nats": 3.2}
            scores |= {"chat/nats": chat + 0.001 * seed * len(way), "questions/piqa": 0.6}
            if way != "as it was":
                scores |= {"steps": 40.0, "seconds": 300.0, "reached": float(way != "LoRA" or seed > 0)}
            if way == "memory":
                scores["background_reads_changed"] = 0.03
            runs.append({"way": way, "seed": seed, **scores})
    head = {"command": "engrammar lab forgetting", "date": "2026-11-30", "machine": MACHINE, "base": "a model"}
    equal = {"nats": 1.0, "blocks": 32, "epochs": 12, "rows": 2000}
    return head | {"amount": {"num_taught": 1000}, "how": {"most_common": 0.005}, "equal": equal, "runs": runs}


def made_edit(said=0.97):
    """One order of facts, two ways at two numbers of edits; the share said as given."""
    shares = {name: 0.9 for name, *_ in SHOWN} | {name: 0.5 for name, *_ in BESIDES} | {"free/prompt": said}
    costs = {"bytes": 5000, "seconds": 20.0, "undo seconds": 0.1, "refused": 0, "undone to the bit": True}
    runs = [
        {"cases": "counterfact", "way": way, "edits": edits, "seed": 0, **shares, **costs}
        for way in ("gated", "a rival")
        for edits in (10, 1000)
    ]
    head = {"command": "engrammar lab edit FACTS...", "date": "2026-11-29", "machine": MACHINE, "base": "a model"}
    return head | {"ask": {"questions": 100}, "facts": {}, "runs": runs}


def everything():
    """A result for every section."""
    return {
        **{name: made_study(name) for name in STUDIES},
        "allocation": made_allocation(),
        "horizon": made_horizon(),
        "horizon-tasks": made_horizon_tasks(),
        "scaling": made_scaling(lambda rows: 2.2 - 0.03 * np.log10(rows)),
        "tasks": made_tasks(0.05),
        "attach": made_attach(),
        "edit": made_edit(),
        "forgetting": made_forgetting(),
        "depth": made_depth(),
        "gates": made_gates(),
        "traffic": made_traffic(),
    }
