"""Memory in torchtitan: every layout trains as one rank does, checkpoints move between layouts, weights become ours.

It runs in an environment of its own, which `make test-titan` makes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "torchtitan", reason="torchtitan is not installed here: `make test-titan` makes an environment with it"
)

import titan_cpu
import torch

from engrammar.model.presets import preset
from engrammar.titan import config_registry as configs
from engrammar.titan.names import ours_at, ours_of, to_ours, to_titan
from engrammar.train.data import TokenSet
from processes import environment
from token_sets import token_set

pytestmark = [pytest.mark.titan, pytest.mark.timeout(1800)]
STEPS, SAVED = 5, 3
ROWS = 2e-3  # the rows' norm: the gate's root is steep where a score is near 0, and rounding shows there
DEBUG = configs.debug_model()
# The number of ranks, and settings of torchtitan; FSDP2 shards over the ranks that are left.
LAYOUTS: dict[str, tuple[int, dict[str, int | str]]] = {
    "one rank": (1, {}),
    "FSDP2 on 2": (2, {}),
    "HSDP on 2": (2, {"data_parallel_replicate_degree": 2}),
    "experts over 2": (2, {"expert_parallel_degree": 2}),
    "pipeline 2": (2, {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "Interleaved1F1B"}),
    "all three on 4": (4, {"pipeline_parallel_degree": 2, "expert_parallel_degree": 2}),
}


def launch(folder: Path, name: str, layout: str, *arguments: str) -> subprocess.CompletedProcess:
    """torchtitan's own training of `debug` on a CPU; the same 8 sequences a step in every layout."""
    num_ranks, settings = LAYOUTS[layout]
    data_ranks = num_ranks // int(settings.get("pipeline_parallel_degree", 1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += [titan_cpu.__file__, str(folder / f"{name}.json"), *arguments, "--module=engrammar.titan"]
    command += ["--config=debug", f"--dataloader.dataset_path={folder / 'tokens'}", f"--dump_folder={folder / name}"]
    command += [f"--parallelism.{name}={value}" for name, value in settings.items()]
    command += [f"--training.local_batch_size={8 // data_ranks}", f"--training.steps={STEPS}"]
    command += ["--optimizer.rows_eps=1e-3", "--training.mixed_precision_param=float32", "--debug.seed=1"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900, cwd=folder)


def steps(folder: Path, name: str, layout: str, *arguments: str) -> list[dict[str, float]]:
    done = launch(folder, name, layout, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / f"{name}.json").read_text())


def row_norms(run: list[dict[str, float]]) -> list[float]:
    return [step["row_norm"] for step in run]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokens, and a seed checkpoint from which every run starts."""
    place = tmp_path_factory.mktemp("titan")
    generator = torch.Generator().manual_seed(0)
    chances = 1 / torch.arange(1, 510)
    ids = torch.multinomial(chances, 20_000, replacement=True, generator=generator) + 3
    write_tokens(place / "tokens", ids.numpy())
    seeded = launch(place, "seed", "one rank", "--checkpoint.enable", "--checkpoint.create_seed_checkpoint")
    assert seeded.returncode == 0, seeded.stderr[-4000:]
    return place


def checkpoint(folder: Path, layout: str) -> Path:
    return folder / layout.replace(" ", "-") / "checkpoint" / f"step-{SAVED}"


def sequences(folder: Path, step: int, length: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 sequences that torchtitan reads in the step after `step` steps, and those of the step after it."""
    tokens = TokenSet.open(folder / "tokens")
    starts = [length * (8 * step + index) for index in range(16)]
    ids = torch.stack([torch.from_numpy(tokens.read("train", start, start + length + 1)) for start in starts])
    return ids[:8], ids[8:]


def write_tokens(folder: Path, ids) -> None:
    made = token_set(folder, vocab_size=512, train=ids, validation=ids[:100])
    about = {
        "format": 1, "dtype": made.dtype, "vocab_size": made.vocab_size, "pad_id": 0, "tokenizer_sha256": "",
        "settings": {}, "num_repeated": 0,
        "splits": {
            name: {**vars(info), "shards": [vars(shard) for shard in info.shards]} for name, info in made.splits.items()
        },
    }  # fmt: skip
    (folder / "tokens.json").write_text(json.dumps(about))


def from_seed(folder: Path) -> tuple[str, ...]:
    seed = next((folder / "seed" / "checkpoint").iterdir())
    return ("--checkpoint.enable", f"--checkpoint.interval={SAVED}", f"--checkpoint.initial_load_path={seed}")


@pytest.fixture(scope="module")
def runs(folder):
    return {layout: steps(folder, layout.replace(" ", "-"), layout, *from_seed(folder)) for layout in LAYOUTS}


def test_every_layout_trains_as_one_rank_does(runs):
    one = runs["one rank"]
    assert len(one) == STEPS and one[-1]["loss"] < one[0]["loss"] - 0.02
    for name, run in runs.items():
        for found, expected in zip(run, one, strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], abs=2e-5), name
            assert found["norm"] == pytest.approx(expected["norm"], rel=2e-5), name
        assert row_norms(run) == pytest.approx(row_norms(one), rel=ROWS), name


def test_tables_lie_with_the_layers_that_read_them(runs):
    assert runs["one rank"][0]["tables"] == runs["FSDP2 on 2"][0]["tables"] == ["1", "2"]
    assert runs["all three on 4"][0]["tables"] == ["2"]  # on the last rank


@torch.no_grad()
@pytest.mark.parametrize("layout", ["one rank", "all three on 4"])
def test_a_checkpoint_of_any_layout_becomes_our_model(folder, runs, layout):
    """Its loss on the next step's sequences is the loss that torchtitan had there."""
    ours = ours_at(checkpoint(folder, layout), DEBUG).eval()
    found = [float(ours(ids, labels=ids).loss) for ids in sequences(folder, step=SAVED)]
    assert found[0] == pytest.approx(runs[layout][SAVED]["loss"], abs=1e-4)
    assert abs(found[1] - found[0]) > 1e-3  # the control: other sequences


def test_rows_that_are_averaged_are_told_by_their_norm(folder, runs):
    """The control: torchtitan's loss is divided by the tokens of all ranks, so gradients are summed."""
    averaged = steps(folder, "averaged", "FSDP2 on 2", "--averaged", *from_seed(folder))
    assert averaged[0]["loss"] == pytest.approx(runs["one rank"][0]["loss"], abs=2e-4)  # the loss does not show it
    assert row_norms(averaged)[0] == pytest.approx(row_norms(runs["one rank"])[0] / 2, rel=1e-2)


def test_a_checkpoint_goes_on_in_other_layouts(folder, runs):
    source = checkpoint(folder, "all three on 4")
    assert source.is_dir()
    for name in ("one rank", "experts over 2", "pipeline 2"):
        again = f"again-{name.replace(' ', '-')}"
        (folder / again / "checkpoint").mkdir(parents=True)
        os.symlink(source, folder / again / "checkpoint" / source.name)
        found = steps(folder, again, name, "--checkpoint.enable", "--checkpoint.interval=100")
        assert [step["step"] for step in found] == list(range(SAVED + 1, STEPS + 1))
        straight = runs["all three on 4"][SAVED:]
        assert row_norms(found) == pytest.approx(row_norms(straight), rel=ROWS), (
            name
        )  # of rows, their state and their lr
        for here, expected in zip(found, straight, strict=True):
            assert here["loss"] == pytest.approx(expected["loss"], abs=2e-5), name
            assert here["norm"] == pytest.approx(expected["norm"], rel=2e-5), name


@pytest.mark.parametrize("branches", [1, 2])
@torch.no_grad()
def test_weights_are_ours_and_back(branches):
    config = configs.debug_model(num_branches=branches)
    model = configs.spec("debug", configs.titan_config(config)).model.build()
    model.init_weights()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
    for table in model.retrieval.placement.tables.values():
        table.normal_(generator=generator)
    for layer in model.layers.values():
        if layer.moe_enabled:
            layer.moe.expert_bias_E.copy_(torch.randn(layer.moe.expert_bias_E.shape, generator=generator) * 0.05)
    ours = ours_of(model, config).eval()
    ids = torch.randint(3, 512, (2, 40), generator=generator)
    found = model.eval()(ids, positions=torch.arange(40).expand(2, -1))
    expected = ours(ids).logits
    assert expected.abs().max() > 1 and (found - expected).abs().max() < 1e-4
    state = {name: value for name, value in model.state_dict().items() if "tokens_per_expert" not in name}
    back = to_titan(to_ours(state))
    assert back.keys() == state.keys() - {name for name in state if "rope" in name}
    for name, value in back.items():
        assert torch.equal(value, state[name]), name
    for table in model.retrieval.placement.tables.values():  # the control: other rows, other logits
        table.zero_()
    assert (model(ids, positions=torch.arange(40).expand(2, -1)) - expected).abs().max() > 1e-2
    with pytest.raises(ValueError, match="of another model"):
        ours_of(model, configs.debug_model(num_branches=branches, memory={**config.memory, "layers": [1]}))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("tensor_parallel_degree", "ids are not cut over ranks"),
        ("context_parallel_degree", "an n-gram would begin on another rank"),
    ],
)
def test_what_would_read_wrong_rows_is_refused(setting, sentence):
    config = configs.debug()
    setattr(config.parallelism, setting, 2)
    with pytest.raises(ValueError, match=sentence):
        config.model_spec.model.update_from_config(config=config)


def test_pipelines_that_would_leave_rows_without_gradients_are_refused():
    config = configs.debug()
    config.parallelism.pipeline_parallel_degree = 2
    config.model_spec.model.update_from_config(config=config)
    config.validator.enable = True
    with pytest.raises(ValueError, match="gives later stages no ids"):
        config.model_spec.model.update_from_config(config=config)
    config.parallelism.pipeline_parallel_schedule = "ZBVZeroBubble"
    with pytest.raises(ValueError, match="'ZBVZeroBubble' may compute gradients .* to one of 1F1B"):
        config.model_spec.model.update_from_config(config=config)


def test_cuda_graphs_and_a_missing_tokenizer_are_refused(tmp_path):
    config = configs.debug()
    config.training.disable_cuda_graphs = False
    with pytest.raises(ValueError, match="--training.disable_cuda_graphs"):
        config.model_spec.model.update_from_config(config=config)
    compressed = configs.m100().model_spec.model.retrieval
    with pytest.raises(ValueError, match="needs the tokenizer"):
        compressed.build().init_states()


@pytest.mark.parametrize("name", ["engrammar_27b", "engrammar_40b", "m100"])
def test_configs_have_the_parameters_of_their_presets(name):
    """Built on the meta device; the tables are none of torchtitan's parameters."""
    from engrammar.model.budget import count_parameters

    presets = {"engrammar_27b": "engram-27b", "engrammar_40b": "engram-40b", "m100": "100m"}
    counts = count_parameters(preset(presets[name]))
    with torch.device("meta"):
        model = getattr(configs, name)().model_spec.model.build()
    assert sum(parameter.numel() for parameter in model.parameters()) == (
        counts.total_parameters - counts.memory_parameters
    )
