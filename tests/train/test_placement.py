"""Wherever a table's rows are, training gives the same bits; over ranks, the same curve with a share of the table."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from group_worker import share_in_groups
from sharded_worker import compare_with_one_process
from torch.distributed.checkpoint import HuggingFaceStorageReader

from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.table import draw_rows_
from engrammar.tables.shards import table_shard
from engrammar.train.optimizer import OptimizerSettings, build_optimizer
from engrammar.train.pages import zeros_in_file, zeros_in_ram
from engrammar.train.placement import place_tables, placement_of
from models import tiny_config, tiny_model
from processes import succeed_on_ranks

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
PLACES = [("device", "none"), ("ram", "none"), ("ram", "exact"), ("file", "none"), ("file", "exact")]


def optimizer_of(model, **choices):
    return build_optimizer(model, OptimizerSettings(max_grad_norm=1.0, **choices), **SETTINGS)


def batches(num_steps: int, micro: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randint(3, 53, (4, 11), generator=generator) for _ in range(micro)] for _ in range(num_steps)]


def train(model, optimizer, steps, *, ahead: bool = False) -> list[float]:
    losses = []
    for micro_batches in steps:
        reads = [None] * len(micro_batches)
        if ahead:
            reads = model.model.memory.retrieve_step([{"input_ids": ids} for ids in micro_batches])
        for ids, retrieved in zip(micro_batches, reads):
            loss = model(ids, labels=ids, retrieved=retrieved).loss / len(micro_batches)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def weights(model) -> dict[str, torch.Tensor]:
    placement = placement_of(model)
    placed = {}
    if placement is not None:
        placement.flush()
        placed = {f"{name}.weight": table.detach().clone() for name, table in placement.tables.items()}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | placed


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module", params=["adam", "row_adam", "sinkhorn"])
def plain(request):
    """A row optimizer, and what training with it gives where the tables are parameters."""
    model = tiny_model("paper", num_branches=2).train()
    losses = train(model, optimizer_of(model, memory=request.param), batches(4, 2))
    return request.param, losses, weights(model)


@pytest.mark.parametrize(("where", "overlap"), PLACES)
@pytest.mark.parametrize("ahead", [False, True], ids=["read as needed", "read ahead"])
def test_training_gives_the_same_bits_wherever_the_rows_are(tmp_path, plain, where, overlap, ahead):
    kind, losses, expected = plain
    placed = tiny_model("paper", num_branches=2).train()
    place_tables(placed, where=where, folder=tmp_path, overlap=overlap)
    assert not any("tables" in name for name, _ in placed.named_parameters())
    found = train(placed, optimizer_of(placed, memory=kind), batches(4, 2), ahead=ahead)
    assert found == losses
    assert_equal(weights(placed), expected)


@pytest.mark.parametrize(("where", "overlap"), PLACES)
def test_training_in_bf16_autocast_gives_the_same_bits_and_nearly_those_of_fp32(tmp_path, where, overlap):
    def trained(bf16: bool, placed: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = tiny_model("paper", num_branches=2).train()
        if placed:
            place_tables(model, where=where, folder=tmp_path, overlap=overlap)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return train(model, optimizer_of(model), batches(4, 2)), weights(model)

    losses, expected = trained(bf16=True, placed=False)
    found, placed = trained(bf16=True, placed=True)
    assert found == losses
    assert_equal(placed, expected)
    precise = trained(bf16=False, placed=False)[0]
    assert losses != precise and losses == pytest.approx(precise, abs=3e-2)


def test_a_stale_read_is_one_update_old_and_no_more():
    """The rows of the next step are read before this step's update, and only of the next."""
    steps = batches(3, 1)
    model = tiny_model("paper").train()
    placement = place_tables(model, where="ram", overlap="stale")
    optimizer = optimizer_of(model, memory="row_adam")
    (name, table), *_ = placement.tables.items()
    seen, held, ahead = [], [], []
    for index, (ids,) in enumerate(steps):
        upcoming = steps[index : index + 2] if index == 0 else steps[index + 1 : index + 2]
        for (later,) in upcoming:
            ahead.append(model.retrieve(later))
        placement.flush()
        model(ids, labels=ids, retrieved=ahead.pop(0)).loss.backward()
        (read,) = placement.open
        seen.append(read.fetched.result().leaves[name].detach().clone())
        held.append((table.detach().clone(), read.rows[name]))
        optimizer.step()
        optimizer.zero_grad()
    placement.flush()
    assert torch.equal(seen[0], held[0][0][held[0][1]])
    for step in (1, 2):
        before_last_update, (now, rows) = held[step - 1][0], held[step]
        assert torch.equal(seen[step], before_last_update[rows])
        assert not torch.equal(seen[step], now[rows])


def test_zeroing_gradients_between_forward_and_backward_loses_none():
    plain, placed = (tiny_model("paper").train() for _ in range(2))
    place_tables(placed, where="ram")
    (ids,) = batches(1, 1)[0]
    for model in (plain, placed):
        optimizer = optimizer_of(model)
        model(ids, labels=ids).loss.backward()  # to be forgotten
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_equal(weights(placed), weights(plain))


def test_rows_of_another_batch_or_of_an_earlier_step_are_refused():
    model = tiny_model("paper").train()
    place_tables(model, where="ram")
    optimizer = optimizer_of(model)
    ids, other = batches(1, 2)[0]
    retrieved = model.retrieve(ids)
    with pytest.raises(ValueError, match="made for other input_ids"):
        model(other, retrieved=retrieved)
    model(ids, labels=ids, retrieved=retrieved).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="retrieved for an earlier step"):
        model(ids, labels=ids, retrieved=retrieved)


def test_evaluation_reads_the_rows_as_updated(tmp_path):
    model = tiny_model("paper").train()
    place_tables(model, where="file", folder=tmp_path, overlap="exact")
    train(model, optimizer_of(model), batches(2, 1))
    (ids,) = batches(1, 1)[0]
    with torch.no_grad():
        placed = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "saved")
    loaded = EngrammarForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, placed)
    assert_equal(weights(loaded), weights(model))


@pytest.mark.parametrize("where", ["device", "ram"])
def test_release_gives_the_tables_back(where):
    plain, placed = tiny_model("paper"), tiny_model("paper")
    place_tables(placed, where=where).release()
    assert placement_of(placed) is None
    assert_equal(weights(placed), weights(plain))
    assert place_tables(placed).num_ranks == 1  # and they can be placed again


def test_rows_drawn_elsewhere_equal_the_models_own():
    torch.manual_seed(7)
    own = EngrammarForCausalLM(tiny_config("paper"))
    torch.manual_seed(7)
    elsewhere = EngrammarForCausalLM(tiny_config("paper"), tables="external")
    with pytest.raises(ValueError, match="place_tables"):
        elsewhere.model.memory.set_classes(torch.arange(53) % 41)
        elsewhere(torch.tensor([[3, 4]]))
    own.model.memory.set_classes(torch.arange(53) % 41)
    place_tables(elsewhere, where="ram")
    assert_equal(weights(elsewhere), weights(own))


@pytest.mark.parametrize(("first", "count"), [(0, 3), (4095, 2), (4096, 5000), (5000, 1), (9000, 0)])
def test_any_part_of_a_table_is_drawn_like_the_whole(first, count):
    whole, part = torch.empty(10_000, 3), torch.full((count, 3), torch.nan)
    draw_rows_(whole, seed=5, first_row=0, std=0.1)
    draw_rows_(part, seed=5, first_row=first, std=0.1)
    assert torch.equal(part, whole[first : first + count])
    assert abs(whole.std().item() - 0.1) < 0.01


def test_bf16_rows_are_read_as_bf16_and_their_gradients_summed_in_fp32():
    model = tiny_model("paper").bfloat16().train()
    placement = place_tables(model, where="ram")
    ids = torch.full((8, 32), 5)
    loss = model(ids, labels=ids).loss
    leaf = next(iter(placement.open[0].fetched.result().leaves.values()))
    assert leaf.dtype == torch.float32
    loss.backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32
    optimizer_of(model, memory_rounding="stochastic").step()
    assert all(table.dtype == torch.bfloat16 for table in placement.tables.values())


def test_memory_of_rows_is_taken_page_by_page(tmp_path):
    ram, file = zeros_in_ram((1 << 20, 64), torch.float32), zeros_in_file((1 << 12, 64), torch.float32, tmp_path)
    assert ram[12345].sum() == 0 and file[77].sum() == 0
    file[77] = 1
    assert file.sum() == 64
    assert list(tmp_path.iterdir()) == []  # it has no name: nothing is left behind, however the process ends
    assert zeros_in_ram((0, 4), torch.float32).shape == (0, 4)


def test_a_disk_without_room_is_refused_before_training(tmp_path):
    with pytest.raises(OSError, match="no room for .* GB of rows"):
        zeros_in_file((1 << 40, 64), torch.float32, tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"where": "disc"}, "where is 'disc'; allowed: device, ram, file"),
        ({"overlap": "yes"}, "allowed: auto, none"),
        ({"reduce": "max"}, "reduce is 'max'; allowed: mean, sum"),
    ],
)
def test_wrong_places_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        place_tables(tiny_model("paper"), **settings)


def test_there_must_be_tables_and_they_are_placed_once():
    with pytest.raises(ValueError, match="has no memory tables|it has no memory tables"):
        place_tables(tiny_model(None))
    model = tiny_model("paper")
    place_tables(model)
    with pytest.raises(ValueError, match="placed already"):
        place_tables(model)
    with pytest.raises(ValueError, match="dense_adam"):
        optimizer_of(model, memory="dense_adam")


def test_state_is_saved_by_rows_and_read_back(tmp_path):
    model = tiny_model("paper").train()
    placement = place_tables(model, where="ram")
    optimizer = optimizer_of(model, memory="adam")
    train(model, optimizer, batches(2, 1))
    model.save_pretrained(tmp_path)
    placement.save_state(tmp_path, optimizer.rows)
    other = tiny_model("paper", seed=3).train()
    again = place_tables(other, where="ram")
    other_optimizer = optimizer_of(other, memory="adam")
    again.load(tmp_path)
    again.load_state(tmp_path, other_optimizer.rows)
    for name, table in placement.tables.items():
        assert torch.equal(again.tables[name], table)
        for key, values in optimizer.rows.state[table].items():
            assert torch.equal(other_optimizer.rows.state[again.tables[name]][key], values), key
    (tmp_path / table_shard("model.memory.tables.1.optimizer")).unlink()
    with pytest.raises(ValueError, match=r"has no memory\.tables\.1\.optimizer\.safetensors"):
        again.load_state(tmp_path, other_optimizer.rows)
    with pytest.raises(ValueError, match=r"should hold .*moment_and_count"):
        wrong = optimizer_of(other, memory="row_adam")
        placement.save_state(tmp_path, optimizer.rows)
        again.load_state(tmp_path, wrong.rows)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_one_step_over_ranks_equals_one_process(tmp_path, num_ranks):
    """Every kind of optimizer and place: same loss and same update within rounding, each rank with its share."""
    succeed_on_ranks(num_ranks, tmp_path, compare_with_one_process, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {
        f"{kind} {where}" for kind in ("adam", "row_adam", "sinkhorn") for where in ("device", "ram")
    }
    for run, found in report.items():
        assert found["largest_loss_difference"] < 1e-6, run
        assert found["largest_weight_difference"] < 1e-6, run
        assert found["rows_held"] == -(-found["num_rows"] // num_ranks), run
        assert 0 < found["sent_bytes"] < found["undeduplicated_bytes"], run


@pytest.mark.slow
def test_a_group_of_ranks_shares_tables_under_a_loss_that_is_summed(tmp_path):
    """Ranks 0 and 2 of three, with unequal tokens, equal one process; averaged, their norms show the difference."""
    succeed_on_ranks(3, tmp_path, share_in_groups, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(difference < 1e-5 for difference in report["sum"].values()), report
    assert report["mean"]["row_norms"] > 0.4 and report["mean"]["norms"] > 1e-4 and report["mean"]["rows"] > 1e-3


def test_torchs_distributed_checkpoint_reads_the_tables(tmp_path):
    """The files are plain safetensors, so its reader brings them to any sharding of its own."""
    model = tiny_model("paper")
    placement = place_tables(model, where="ram")
    optimizer = optimizer_of(model, memory="adam")
    train(model, optimizer, batches(1, 1))
    model.save_pretrained(tmp_path)
    placement.save_state(tmp_path, optimizer.rows)
    expected = {f"{name}.weight": table.detach() for name, table in placement.tables.items()}
    for name, table in placement.tables.items():
        expected |= {f"{name}.{key}": values for key, values in optimizer.rows.state[table].items()}
    found = {key: torch.full_like(values, -1) for key, values in expected.items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert len(found) == 8
    assert_equal(found, expected)
