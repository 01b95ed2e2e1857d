"""Studies are equal where they say so and go on after a kill."""

import json
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from engrammar.model.budget import count_parameters, solve_budget
from engrammar.model.presets import preset
from engrammar.train.recipe import load_recipe, to_yaml
from engrammar_cli.main import main
from engrammar_lab import studies
from engrammar_lab.catalogue import HORIZONS, SCALES, STUDIES, studies_at
from engrammar_lab.machine import describe_machine
from engrammar_lab.report.studies import apart
from engrammar_lab.studies import _most_apart, committed, finished, plan, recipes, run_study
from processes import fork_server

TINY = (
    "data.vocab_size=300",
    "data.limit_documents=80",
    "data.batch_size=2",
    "data.sequence_length=16",
    "trainer.max_steps=2",
    "trainer.warmup_steps=1",
)


def test_every_point_of_a_seed_sees_the_same_text_and_training(tmp_path):
    for name, study in STUDIES.items():
        queue = recipes(name, tmp_path, (0, 1))
        assert len({recipe.out for recipe in queue.values()}) == 2 * len(study.points)
        for seed in (0, 1):
            own = [recipe for (_, of), recipe in queue.items() if of == seed]
            assert all(recipe.seed == seed and recipe.data == own[0].data for recipe in own)
            if name in ("rates", "horizon"):  # of several lengths, and rates that are best for each
                lengths = {recipe.trainer["max_steps"] for recipe in own}
                assert lengths == {steps for steps, *_ in HORIZONS.values()}
                own = [recipe for recipe in own if recipe.trainer["max_steps"] == 500]
            assert all(recipe.trainer == own[0].trainer for recipe in own)
            assert name in ("optimizer", "rates") or all(recipe.optimizer == own[0].optimizer for recipe in own)


def test_studies_share_the_runs_that_they_have_in_common(tmp_path):
    allocation, rivals = (recipes(name, tmp_path, (1,)) for name in ("allocation", "rivals"))
    assert rivals["experts", 1].out == allocation["100%", 1].out
    assert rivals["memory", 1].out == allocation["80%", 1].out != allocation["70%", 1].out
    assert recipes("rivals", tmp_path, (2,))["memory", 2].out != rivals["memory", 1].out


def test_the_issues_studies_have_as_many_points_as_they_should():
    assert len(STUDIES["allocation"].points) >= 6
    assert len(STUDIES["scaling"].points) >= 5 and len(STUDIES["ablation"].points) >= 7


def test_unknown_studies_and_counts_are_refused():
    with pytest.raises(ValueError, match="no study 'luck'; known: allocation"):
        run_study("luck")
    with pytest.raises(ValueError, match="seeds is 0"):
        run_study("allocation", seeds=0)


def test_every_study_exists_at_every_scale_and_builds_on_its_own_recipe(tmp_path):
    for scale in SCALES.values():
        missing = STUDIES.keys() - studies_at(scale).keys()
        assert missing == (set() if scale.recipe == "lab" else {"rates", "horizon"})
        for name, study in studies_at(scale).items():
            assert len(study.points) >= 2
            for recipe in recipes(name, tmp_path, (0,), scale=scale.recipe).values():
                assert recipe.model.preset == load_recipe(scale.recipe).model.preset
    with pytest.raises(ValueError, match="no scale 'moon'; known: lab, lab-100m"):
        recipes("pair", tmp_path, (0,), scale="moon")


def test_the_100m_recipes_build_equal_models_on_the_preset_alone():
    """The models of a dry run, without its text: the preset's own vocabulary stands for a tokenizer's."""
    plain = preset("100m", memory=None)
    target = count_parameters(plain)
    dense = dict(setting.removeprefix("model.settings.").split("=") for setting in SCALES["lab-100m"].dense)
    smaller = count_parameters(preset("100m", memory=None, **{name: int(value) for name, value in dense.items()}))
    assert smaller.active_parameters == pytest.approx(target.active_parameters, rel=1e-3)
    memory = preset("100m").memory_config
    hashed = preset("100m", memory=None, num_classes=32_768, fill_class=0)
    for rho in (0.9, 0.1):
        counts = count_parameters(solve_budget(hashed, memory, rho=rho))
        assert counts.total_parameters == pytest.approx(target.total_parameters, rel=1e-3)
        assert counts.active_parameters == pytest.approx(target.active_parameters, rel=1e-3)


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Settings of a corpus made here."""
    monkeypatch.chdir(tmp_path)
    texts = [f"the cat {i} sat on the mat and the dog {i % 7} ate {i * 13 % 50} fish " * 4 for i in range(90)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return (*TINY, "data.source=text.jsonl", "data.validation_share=0.2")


def test_a_dry_run_counts_every_point_and_trains_nothing(text, tmp_path):
    planned = plan("rivals", overrides=(*text, "model.rho=0.9"))
    assert [point["point"] for point in planned] == list(STUDIES["rivals"].points)
    assert all(point["tokens"] == 2 * 2 * 16 for point in planned)
    assert planned[0]["training_flops"] == 6 * planned[0]["active_parameters"] * 64
    totals = [point["total_parameters"] for point in planned[:6]]
    assert totals == pytest.approx([totals[1]] * 6, rel=0.005)
    assert not (tmp_path / "runs").exists()


def rerun_of(arguments) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as end:
        main(["lab", *arguments])
    return end.value.code


def test_a_run_made_with_other_settings_does_not_answer_for_these(tmp_path):
    """A default that changed leaves a run's name as it was."""
    recipe = recipes("boundary", tmp_path, (0,))["end of text", 0]
    Path(recipe.out).mkdir()
    (Path(recipe.out) / "recipe.yaml").write_text(to_yaml(recipe))
    assert finished(recipe) is None
    (Path(recipe.out) / "finished.json").write_text('{"steps": 1}')
    assert finished(recipe) == {"steps": 1}
    earlier = replace(recipe, optimizer=replace(recipe.optimizer, balance_rate=recipe.optimizer.balance_rate / 2))
    (Path(recipe.out) / "recipe.yaml").write_text(to_yaml(earlier))
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(optimizer.balance_rate is 0.0005 there"):
        run_study("boundary", runs=tmp_path, seeds=1)


def test_a_committed_run_is_not_trained_again_on_another_day(tmp_path):
    queue = recipes("horizon", tmp_path / "runs", (0,))
    key = ("8M, 10%", 0)
    instructions = describe_machine()["instructions"]
    made = {
        "machine": {"instructions": instructions},
        "recipe": to_yaml(replace(recipes("rates", tmp_path, (0,))["2M, 100%, 0.004", 0], out="")),
        "runs": [{"point": "8M, 10%, 0.008", "seed": 0, "recipe": Path(queue[key].out).name, "bits_per_byte": 1.5}],
    }
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(made))
    (tmp_path / "tasks.json").write_text('{"points": []}')  # a result that is no study
    assert committed(queue, tmp_path) == {key: {"recipe": Path(queue[key].out).name, "bits_per_byte": 1.5}}
    assert committed(recipes("horizon", tmp_path / "runs", (1,)), tmp_path) == {}
    path.write_text(json.dumps(made | {"machine": {"instructions": "ABACUS"}}))
    with pytest.raises(ValueError, match=f"made with ABACUS instructions, here they are {instructions}"):
        committed(queue, tmp_path)
    path.write_text(json.dumps(made | {"recipe": made["recipe"].replace("balance_rate: 0.001", "balance_rate: 0.1")}))
    with pytest.raises(ValueError, match=r"optimizer.balance_rate is 0.1 there, 0.001 here"):
        committed(queue, tmp_path)


def test_the_rates_that_the_sweep_tried_are_runs_of_the_horizon(tmp_path):
    rates, horizon = (recipes(name, tmp_path, (0,)) for name in ("rates", "horizon"))
    folders = {recipe.out for recipe in rates.values()}
    for tokens, (_, rate) in HORIZONS.items():
        for share in ("100%", "10%"):
            assert horizon[f"{tokens}, {share}", 0].out in folders, (tokens, share, rate)


@pytest.fixture
def forked(monkeypatch):
    """Runs are forks of one process that has loaded torch, which takes seconds."""
    with monkeypatch.context() as patched:
        patched.setattr(studies, "get_context", lambda _: fork_server())
        yield patched


@pytest.mark.slow
def test_a_study_runs_a_second_call_trains_nothing_again_and_a_stranger_finds_the_same(text, tmp_path, capsys, forked):
    """The stranger's process starts anew."""
    how = {"runs": tmp_path / "runs", "seeds": 1, "jobs": 2, "results": tmp_path / "results", "overrides": text}
    first = run_study("boundary", **how)
    assert [run["point"] for run in first["runs"]] == list(STUDIES["boundary"].points)
    assert all(run["flops_per_token"] > 1e5 and len(run["curve"]) <= 1 for run in first["runs"])
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("result.json")}
    again = run_study("boundary", **how)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("result.json")}
    assert [run["bits_per_byte"] for run in again["runs"]] == [run["bits_per_byte"] for run in first["runs"]]
    assert json.loads((tmp_path / "results" / "boundary.json").read_text()) == again
    assert max(apart(first)[kind] for kind in ("total_parameters", "active_parameters")) < 0.01
    check = ["rerun", "boundary", "end of text", "--out", str(tmp_path / "own"), "--results", str(tmp_path / "results")]
    again["runs"].append({**again["runs"][0], "seed": 1, "bits_per_byte": again["runs"][0]["bits_per_byte"] + 0.001})
    (tmp_path / "results" / "boundary.json").write_text(json.dumps(again))
    with forked.context() as anew:
        anew.setattr(studies, "get_context", get_context)
        assert rerun_of(check) == 0
    assert "Equal to the last bit." in capsys.readouterr().out
    again["machine"]["instructions"] = "abacus"
    for moved, fails in ((0.01, False), (0.1, True)):  # the deviation, 0.0007, allows for 0.064: one degree of freedom
        again["runs"][0]["bits_per_byte"] = first["runs"][0]["bits_per_byte"] + moved
        again["runs"][-1]["bits_per_byte"] = again["runs"][0]["bits_per_byte"] + 0.001
        (tmp_path / "results" / "boundary.json").write_text(json.dumps(again))
        assert rerun_of(check) == int(fails)
        said = capsys.readouterr().out
        assert f"They differ by -{moved}" in said and ("too much" in said) == fails
        assert "used abacus instructions" in said
    again["runs"].pop()
    (tmp_path / "results" / "boundary.json").write_text(json.dumps(again))
    assert rerun_of(check) == 2
    assert "one seed of each point" in capsys.readouterr().err


def test_two_runs_of_a_point_are_apart_as_the_pooled_deviation_says():
    values = {"a": [1.0, 1.2, 1.1], "b": [3.0, 3.0], "c": [9.0]}  # squares 0.02 and 0 over 2 + 1 degrees of freedom
    runs = [{"point": point, "bits_per_byte": value} for point, own in values.items() for value in own]
    assert _most_apart(runs) == pytest.approx(5.8409 * (2 * 0.02 / 3) ** 0.5, rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_100m_recipe_trains_when_its_model_is_made_small(text, tmp_path):
    small = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 16,
        "intermediate_size": 512,
        "moe_intermediate_size": 16,
        "n_routed_experts": 12,
        "num_hidden_layers": 6,
        "memory.head_dim": 4,
    }
    settings = [f"model.settings.{name}={value}" for name, value in small.items()]
    settings += ["model.rho=0.5", "data.batch_size=4", "trainer.per_device_eval_batch_size=4", "trainer.bf16=false"]
    how = {"runs": tmp_path / "runs", "seeds": 1, "jobs": 1, "results": tmp_path / "results", "scale": "lab-100m"}
    made = run_study("pair", **how, overrides=(*text, *settings))
    assert made["scale"] == "lab-100m" and made["command"].endswith("--scale lab-100m --seeds 1")
    assert [run["point"] for run in made["runs"]] == ["MoE", "MoE + memory"]
    assert max(apart(made)[kind] for kind in ("total_parameters", "active_parameters")) < 0.05
