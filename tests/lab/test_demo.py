"""The demo's report follows from its JSON, and its sentence says what the numbers say."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from engrammar_cli.main import main as command_line
from engrammar_lab.demo_report import plot_curves, render, verdict
from engrammar_lab.gates import gates_over_text, plot_gates
from models import tiny_model

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "demo"


def result_with(plain: list[float], memory: list[float]) -> dict:
    runs = [
        {"variant": variant, "seed": seed, "validation_bits_per_byte": bits}
        for variant, values in (("moe", plain), ("moe + memory", memory))
        for seed, bits in enumerate(values)
    ]
    return {"runs": runs}


def test_the_committed_report_is_made_from_the_committed_json():
    result = json.loads((RESULTS / "demo.json").read_text())
    assert (RESULTS / "demo.md").read_text() == render(result)
    assert len({run["seed"] for run in result["runs"]}) >= 3
    assert {"command", "date", "machine", "recipe"} <= result.keys()
    readme = (ROOT / "README.md").read_text()
    assert verdict(result) in " ".join(readme.split())


def test_the_committed_pair_has_equal_total_and_active_parameters():
    runs = json.loads((RESULTS / "demo.json").read_text())["runs"]
    plain = next(run for run in runs if run["variant"] == "moe")
    memory = next(run for run in runs if run["variant"] == "moe + memory")
    for key in ("total_parameters", "active_parameters"):
        assert memory[key] == pytest.approx(plain[key], rel=1e-3)
    assert 0.20 <= 1 - memory["rho"] <= 0.25
    assert memory["steps"] == plain["steps"]


def test_the_committed_curves_can_be_drawn_again(tmp_path):
    plot_curves(json.loads((RESULTS / "demo.json").read_text()), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and (RESULTS / "curves.png").exists()


@pytest.mark.parametrize(
    ("plain", "memory", "said"),
    [
        ([2.0], [1.9], "MoE with memory was better by 0.1000 bits per byte (5.0%); this is one seed"),
        ([1.9], [2.0], "the plain MoE was better by 0.1000"),
        (
            [2.0, 2.1, 2.2],
            [1.9, 2.0, 2.0],
            "by 0.1333 bits per byte (6.3%), ± 0.0577 over 3 seeds; all seeds agree",
        ),
        ([2.0, 2.0, 2.0], [1.9, 2.1, 1.9], "the seeds disagree, so take it as no difference"),
    ],
)
def test_the_verdict_says_who_won_by_how_much_and_whether_to_believe_it(plain, memory, said):
    assert said in verdict(result_with(plain, memory))


class LetterTokenizer:
    """Just enough of a tokenizer for gates_over_text."""

    def __call__(self, text: str, return_tensors: str):
        ids = torch.tensor([[3 + ord(c) % 50 for c in text]])
        return type("Encoded", (), {"input_ids": ids})

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


def test_gates_over_text_are_the_fusions_own_gates():
    model, text = tiny_model("paper", 2), "hello there"
    (gated,) = gates_over_text(model, LetterTokenizer(), [text])
    assert len(gated["tokens"]) == len(text) and list(gated["gates"]) == ["1", "3"]
    recorded = {}
    for layer in (1, 3):
        fusion = model.model.layers[layer].fusion
        fusion.register_forward_hook(
            lambda module, inputs, _, layer=layer: recorded.update({layer: module.gate(*inputs[:2])[0].mean(-1)[0]})
        )
    with torch.no_grad():
        model(LetterTokenizer()(text, "pt").input_ids, use_cache=False)
    for layer, values in gated["gates"].items():
        assert values == pytest.approx(recorded[int(layer)].tolist(), abs=5e-5) and 0 < min(values) <= max(values) < 1
    assert len(model.model.layers[1].fusion._forward_pre_hooks) == 0


def test_a_heat_map_holds_long_and_odd_texts(tmp_path):
    tokens = ["$x^2", "\n", " word"] * 40
    plot_gates([{"tokens": tokens, "gates": {"1": [0.5] * len(tokens)}}], tmp_path / "gates.png")
    assert (tmp_path / "gates.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_demo_leaves_its_results_pictures_and_models(tmp_path, monkeypatch, capsys):
    """`engrammar demo`, whole, on a small text with a small model; a second call finds everything trained."""
    monkeypatch.chdir(tmp_path)
    paragraphs = [text for text in (ROOT / "LICENSE").read_text().split("\n\n") if text.strip()]
    (tmp_path / "licence.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in paragraphs))
    recipe = yaml.safe_load((ROOT / "src" / "engrammar" / "recipes" / "demo.yaml").read_text())
    recipe["data"] |= {"source": "licence.jsonl", "folder": "data", "vocab_size": 400, "sequence_length": 32}
    recipe["data"]["validation_share"] = 0.2
    recipe["model"] |= {"preset": "micro", "rho": 0.78}
    recipe["trainer"] |= {"max_steps": 6, "eval_steps": 3, "save_steps": 3, "logging_steps": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    for _ in range(2):
        command_line(["demo", "--recipe", "small.yaml", "--out", "out"])
        said = " ".join(capsys.readouterr().out.split())
        assert "bits per byte" in said and "this is one seed" in said
    result = json.loads(Path("out/demo.json").read_text())
    assert [run["variant"] for run in result["runs"]] == ["moe", "moe + memory"]
    assert all(run["steps"] == 6 for run in result["runs"]) and result["samples"][0].startswith("The United States is")
    assert len(result["gates"]) >= 3 and all(text["gates"] for text in result["gates"])
    for picture in ("curves.png", "gates.png"):
        assert Path("out", picture).read_bytes().startswith(b"\x89PNG")
    assert Path("out/demo.md").read_text().startswith("# Plain experts against experts with memory")
    assert AutoModelForCausalLM.from_pretrained("out/moe-memory-0").config.memory
