"""Memory in torchtitan: every layout trains as one rank does, checkpoints move between layouts, weights become ours.

It runs in an environment of its own, which `make test-titan` makes.
"""

import pytest

pytest.importorskip(
    "torchtitan", reason="torchtitan is not installed here: `make test-titan` makes an environment with it"
)

import titan_cpu  # noqa: F401 (a CPU in place of an accelerator)
import torch
from launching import LAYOUTS, SAVED, STEPS, checkpoint, from_seed, go_on, launch, sequences

from engrammar.titan import config_registry as configs
from engrammar.titan.names import ours_at, read_checkpoint

pytestmark = [pytest.mark.titan, pytest.mark.timeout(1800)]
ROWS = 2e-3  # the rows' norm: the gate's root is steep where a score is near 0, and rounding shows there
DEBUG = configs.debug_model()


@pytest.fixture(scope="module")
def runs(titan_folder):
    return {
        layout: launch(titan_folder, layout.replace(" ", "-"), layout, *from_seed(titan_folder)) for layout in LAYOUTS
    }


def row_norms(run: list[dict[str, float]]) -> list[float]:
    return [step["rows_grad_norm"] for step in run]


def test_every_layout_trains_as_one_rank_does(runs):
    one = runs["one rank"]
    assert len(one) == STEPS and one[-1]["loss"] < one[0]["loss"] - 0.02
    for name, run in runs.items():
        for found, expected in zip(run, one, strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], abs=2e-5), name
            assert found["norm"] == pytest.approx(expected["norm"], rel=2e-5), name
        assert row_norms(run) == pytest.approx(row_norms(one), rel=ROWS), name


def test_logs_count_rows_bytes_and_gates_over_all_ranks(runs):
    one = runs["one rank"]
    looked_up = 8 * 64 * 2 * 4  # tokens of a step, layers, columns
    for name, run in runs.items():
        for found, expected in zip(run, one, strict=True):
            assert found["rows_looked_up"] == looked_up, name
            for layer in ("gate_mean/1", "gate_mean/2"):
                assert found[layer] == pytest.approx(expected[layer], abs=1e-5), name
            exchanged = name not in ("one rank", "pipeline 2")  # where each table is whole on a rank
            assert (found["bytes_sent"] > 0) == exchanged, name
            assert expected["rows_distinct"] <= found["rows_distinct"] < looked_up, name
    assert one[0]["gate_mean/1"] != one[0]["gate_mean/2"] and one[0]["gate_mean/1"] != one[1]["gate_mean/1"]


def test_tables_lie_with_the_layers_that_read_them(runs):
    assert runs["one rank"][0]["tables"] == runs["FSDP2 on 2"][0]["tables"] == ["1", "2"]
    assert runs["all three on 4"][0]["tables"] == ["2"]  # on the last rank


@torch.no_grad()
@pytest.mark.parametrize("layout", ["one rank", "all three on 4"])
def test_a_checkpoint_of_any_layout_becomes_our_model(titan_folder, runs, layout):
    """Its loss on the next step's sequences is the loss that torchtitan had there."""
    ours = ours_at(checkpoint(titan_folder, layout), DEBUG).eval()
    found = [float(ours(ids, labels=ids).loss) for ids in sequences(titan_folder, step=SAVED)]
    assert found[0] == pytest.approx(runs[layout][SAVED]["loss"], abs=1e-4)
    assert abs(found[1] - found[0]) > 1e-3  # the control: other sequences


def test_rows_that_are_averaged_are_told_by_their_norm(titan_folder, runs):
    """The control: torchtitan's loss is divided by the tokens of all ranks, so gradients are summed."""
    averaged = launch(titan_folder, "averaged", "FSDP2 on 2", "--averaged", *from_seed(titan_folder))
    assert averaged[0]["loss"] == pytest.approx(runs["one rank"][0]["loss"], abs=2e-4)  # the loss does not show it
    assert row_norms(averaged)[0] == pytest.approx(row_norms(runs["one rank"])[0] / 2, rel=1e-2)


def test_a_checkpoint_goes_on_in_other_layouts(titan_folder, runs):
    source = "all three on 4"
    straight = runs[source][SAVED:]
    for name in ("one rank", "experts over 2", "pipeline 2"):
        found = go_on(titan_folder, source, name)
        assert [step["step"] for step in found] == list(range(SAVED + 1, STEPS + 1))
        assert row_norms(found) == pytest.approx(row_norms(straight), rel=ROWS), name  # of rows, their state and rate
        for here, expected in zip(found, straight, strict=True):
            assert here["loss"] == pytest.approx(expected["loss"], abs=2e-5), name
            assert here["norm"] == pytest.approx(expected["norm"], rel=2e-5), name


def test_a_checkpoint_goes_on_to_the_bit_in_its_own_layout(titan_folder, runs):
    source = "all three on 4"
    assert go_on(titan_folder, source, source) == runs[source][SAVED:]
    straight = read_checkpoint(checkpoint(titan_folder, source, STEPS))
    again = read_checkpoint(checkpoint(titan_folder, f"again {source}", STEPS))
    other = read_checkpoint(checkpoint(titan_folder, "one rank", STEPS))
    assert straight.keys() == again.keys() == other.keys() and any("retrieval" in name for name in straight)
    assert not [name for name, value in straight.items() if not torch.equal(value, again[name])]
    assert [name for name, value in straight.items() if not torch.equal(value, other[name])]  # the control
