"""The plan of a training: bytes held are those of a run to the byte, bytes sent are within the noise of hashing."""

import json

import numpy as np
import pytest
import torch
from plan_worker import CLASSES, RANKS, SEQUENCE, SEQUENCES, planned_config, text, train_and_count

from engrammar.model.presets import preset
from engrammar.planning import training
from engrammar.planning.distinct import DistinctRows, count_distinct, measured_for
from engrammar.planning.plan import Addresses
from engrammar.planning.touches import Sample
from engrammar.planning.training import Cluster, Job, make_training_plan
from engrammar_cli.main import main
from models import tiny_config
from processes import succeed_on_ranks

TOKENS = SEQUENCE * SEQUENCES


def counted() -> DistinctRows:
    config = planned_config()
    addresses = Addresses(memory=config.memory_config, geometry=config.memory_geometry, classes_V=CLASSES)
    sample = Sample.of_documents(list(text()), SEQUENCE)
    return count_distinct(addresses, sample, tokens=(TOKENS,), sequence=SEQUENCE, names=("tiny", "random"))


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "matrices"), [("row_adam", "muon"), ("adam", "adamw")])
def test_a_run_holds_and_sends_what_was_planned(tmp_path, memory, matrices):
    """The first rank holds the most; every rank sends what an even hash would, which is off by some percent here."""
    share = counted().share(TOKENS)
    job = Job(config=planned_config(), gpus=RANKS, tokens=TOKENS, share=share, memory=memory, matrices=matrices)
    assert 0.2 < share < 0.9  # repeats count
    succeed_on_ranks(RANKS, tmp_path, train_and_count, tmp_path, memory, matrices)
    found = [json.loads((tmp_path / f"counted-{rank}.json").read_text()) for rank in range(RANKS)]
    assert found[0]["held"] == {**training.sharded_bytes(job), **training.table_bytes(job)}
    planned = training.sent_bytes(job)
    for one in found:
        assert one["looked up"] == job.looked_up
    assert np.mean([one["distinct"] for one in found]) == pytest.approx(job.distinct, rel=0.02)
    for kind in found[0]["sent"]:
        assert np.mean([one["sent"][kind] for one in found]) == pytest.approx(planned[kind], rel=0.05), kind
    everything = Job(config=planned_config(), gpus=RANKS, tokens=TOKENS, share=1.0, memory=memory)
    assert found[0]["sent"]["rows"] < 0.9 * training.sent_bytes(everything)["rows"]  # a plan without repeats is wrong


def test_distinct_rows_are_counted_as_a_hand_counts_them():
    config = planned_config()
    addresses = Addresses(memory=config.memory_config, geometry=config.memory_geometry, classes_V=CLASSES)
    same = Sample.of_documents([np.full(SEQUENCE, 7) for _ in range(4)], SEQUENCE)
    few = count_distinct(addresses, same, tokens=(SEQUENCE, 2 * SEQUENCE), sequence=SEQUENCE, names=("tiny", "sevens"))
    # of the only token, 3 windows differ: at the start, after one token (order 3 alone), further on; 2 heads an order
    distinct = 2 * (2 + 3)
    assert few.shares == (distinct / (SEQUENCE * 4), distinct / (2 * SEQUENCE * 4))
    assert few.share(90) == pytest.approx(np.interp(np.log(90), np.log(few.tokens), few.shares))
    for tokens in (SEQUENCE - 1, 2 * SEQUENCE + 1):
        with pytest.raises(ValueError, match="were counted from 64 to 128 tokens"):
            few.share(tokens)
    with pytest.raises(ValueError, match="sevens has 256 tokens, fewer than a step of 512"):
        count_distinct(addresses, same, tokens=(512,), sequence=SEQUENCE, names=("tiny", "sevens"))
    with pytest.raises(ValueError, match="not whole sequences"):
        count_distinct(addresses, same, tokens=(65,), sequence=SEQUENCE, names=("tiny", "sevens"))


def test_active_parameters_are_those_of_info():
    from engrammar.model.budget import count_parameters

    config = preset("engram-27b")
    job = Job(config=config, gpus=8, tokens=16_384, share=0.8)
    assert sum(job.active.values()) == pytest.approx(count_parameters(config).active_parameters, rel=1e-9)
    assert job.rows_held * 8 == pytest.approx(count_parameters(config).memory_rows, rel=1e-6)


def test_rows_hide_behind_the_blocks_before_the_first_memory_and_nothing_else():
    job = Job(config=planned_config(), gpus=2, tokens=TOKENS, share=0.5)
    slow = Cluster(flops_per_s=1.0)  # the blocks before the memory take for ever
    exposed = training.exposed_seconds(job, slow, "ram")
    assert exposed["bring rows"][1] == exposed["update rows"][1] == 0 < exposed["bring rows"][0]
    assert exposed["return gradients"][1] == exposed["return gradients"][0] > 0
    quick = Cluster(flops_per_s=1e30)
    for where in ("device", "ram", "file"):
        assert all(
            waited == pytest.approx(taken) for taken, waited in training.exposed_seconds(job, quick, where).values()
        )
    assert all(
        waited == taken for taken, waited in training.exposed_seconds(job, slow, "device").values()
    )  # on the device nothing hides
    alone = Job(config=planned_config(), gpus=1, tokens=TOKENS, share=0.5)
    assert not any(training.sent_bytes(alone).values())


def test_links_of_a_node_and_of_the_network_run_at_once():
    job = Job(config=planned_config(), gpus=16, tokens=TOKENS, share=0.5)
    cluster = Cluster(node_bytes_per_s=7.0, network_bytes_per_s=4.0)
    assert training.device_seconds(job, cluster, 15.0) == pytest.approx(2.0)  # 8 peers over the network, 7 in the node


def test_the_command_plans_every_placement(capsys, tmp_path):
    main(["plan", "train", "engram-27b", "--gpus", "8", "64", "--tokens-per-gpu", "16384", "--json"])
    plans = json.loads(capsys.readouterr().out)
    assert [(plan["gpus"], plan["where"]) for plan in plans] == [
        (gpus, where) for gpus in (8, 64) for where in ("device", "ram", "file")
    ]
    on_device, in_ram = plans[0], plans[1]
    tables = on_device["gpu_bytes"]["table rows"] + on_device["gpu_bytes"]["rows' optimizer state"]
    assert on_device["gpu_total"] - in_ram["gpu_total"] == pytest.approx(tables)
    assert in_ram["ram_total"] == tables and plans[2]["file_total"] == tables
    main(["plan", "train", "engram-27b", "--gpus", "1"])
    text = capsys.readouterr().out
    assert "80.2% of the rows" in text and "More than a GPU holds: 1 GPUs, device" in text
    assert "no step of this table was run on a GPU" in text
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps({"gpu_bytes": 1e15}))
    main(["plan", "train", "engram-27b", "--gpus", "1", "--machine", str(machine)])
    assert "More than a GPU holds" not in capsys.readouterr().out


def test_what_was_measured_is_shipped_for_the_papers_presets():
    for model in ("engram-27b", "engram-40b"):
        assert measured_for(model).model == model and 0.7 < measured_for(model).share(16_384) < 0.9


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["nano"], "No distinct rows were counted for nano"),
        (["moe-27b"], "moe-27b has no memory"),
        (["engram-27b", "--tokens-per-gpu", "100"], "were counted from 4,096 to 65,536"),
        (["engram-27b", "--gpus", "0"], "allowed: 1 or more"),
        (["engram-27b", "--rows", "missing.json"], "missing.json holds no distinct rows"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(capsys, args, match):
    with pytest.raises(SystemExit):
        main(["plan", "train", *args])
    assert match in capsys.readouterr().err


def test_a_model_without_memory_and_wrong_shares_are_refused():
    with pytest.raises(ValueError, match="no memory"):
        Job(config=tiny_config(None), gpus=2, tokens=8, share=0.5)
    with pytest.raises(ValueError, match="share of distinct rows is 0"):
        Job(config=planned_config(), gpus=2, tokens=8, share=0)
    assert torch.get_default_device().type == "cpu"  # counting on the meta device leaves nothing behind
    assert make_training_plan(Job(config=planned_config(), gpus=2, tokens=8, share=0.5), Cluster(), "ram")["fits"]
