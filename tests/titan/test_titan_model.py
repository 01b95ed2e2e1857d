"""Memory in torchtitan, in one process: the model is ours with other names, and what cannot be right is refused.

It runs in an environment of its own, which `make test-titan` makes.
"""

import pytest

pytest.importorskip(
    "torchtitan", reason="torchtitan is not installed here: `make test-titan` makes an environment with it"
)

import titan_cpu  # noqa: F401 (a CPU in place of an accelerator)
import torch

from engrammar.config import DIALECTS
from engrammar.fusion import Fusion
from engrammar.model.budget import count_parameters
from engrammar.model.presets import preset
from engrammar.titan import config_registry as configs
from engrammar.titan.names import ours_of, to_ours, to_titan
from engrammar.titan.retrieval import classes_of
from engrammar.train.data import train_tokenizer

pytestmark = pytest.mark.titan


def drawn(config, **retrieval):
    """torchtitan's model with other weights than those it starts with."""
    model = configs.spec("debug", configs.titan_config(config, **retrieval)).model.build()
    model.init_weights()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
    for table in model.retrieval.placement.tables.values():
        table.normal_(generator=generator)
    for layer in model.layers.values():
        if layer.moe_enabled:
            layer.moe.expert_bias_E.copy_(torch.randn(layer.moe.expert_bias_E.shape, generator=generator) * 0.05)
    return model.eval()


def some_ids(num_tokens: int = 40) -> torch.Tensor:
    return torch.randint(3, 512, (2, num_tokens), generator=torch.Generator().manual_seed(2))


def logits(model, ids, positions=None):
    """torchtitan's: attention stays in a document, which the stand-in for its attention takes as a mask."""
    positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
    document = (positions == 0).cumsum(1)
    same = document[:, None, :, None] == document[:, None, None, :]
    return model(ids, positions=positions, attention_masks=same & torch.ones(same.shape[-2:]).tril().bool())


@pytest.mark.parametrize("branches", [1, 2])
@torch.no_grad()
def test_weights_are_ours_and_back(branches):
    config = configs.debug_model(num_branches=branches, hc_eps=1e-3)
    model, ids = drawn(config), some_ids()
    ours = ours_of(model, config).eval()
    expected = ours(ids).logits
    assert expected.abs().max() > 1 and (logits(model, ids) - expected).abs().max() < 1e-4
    state = {name: value for name, value in model.state_dict().items() if "tokens_per_expert" not in name}
    back = to_titan(to_ours(state))
    assert back.keys() == state.keys() - {name for name in state if "rope" in name}
    for name, value in back.items():
        assert torch.equal(value, state[name]), name
    for table in model.retrieval.placement.tables.values():  # the control: other rows, other logits
        table.zero_()
    assert (logits(model, ids) - expected).abs().max() > 1e-2
    with pytest.raises(ValueError, match="of another model"):
        ours_of(model, configs.debug_model(num_branches=branches, memory={**config.memory, "layers": [1]}))


def loss_of(logits_BTV, ids):
    return float(torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("dialect", DIALECTS)
@torch.no_grad()
def test_the_loss_of_a_step_is_ours_in_every_dialect(dialect):
    sizes = {"layers": [1, 2], "num_heads": 2, "head_dim": 16, "fill_id": 0, "compression": "none"}
    orders = DIALECTS[dialect].max_ngram_size - 1
    named = {"dead_ids": [5], "boundary": "dead"} if DIALECTS[dialect].boundary == "dead" else {}
    named |= {"end_ids": [6]} if DIALECTS[dialect].boundary == "end" else {}
    config = configs.debug_model(memory={"dialect": dialect, "rows_per_head": [1000] * orders, **sizes, **named})
    model, ids = drawn(config), some_ids()
    ids[:, 7], ids[:, 9] = 5, 6
    ours = ours_of(model, config).eval()
    expected = loss_of(ours(ids).logits, ids)
    assert loss_of(logits(model, ids), ids) == pytest.approx(expected, abs=1e-4)
    rows_RC = ours.model.memory.table(1).weight
    rows_RC.copy_(rows_RC.roll(1, 0))  # the control: other addresses
    assert loss_of(ours(ids).logits, ids) != pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_packed_documents_are_ours():
    config = configs.debug_model()
    model, ids = drawn(config), some_ids()
    ids[0, [9, 20]] = ids[1, 30] = 1
    expected_positions = torch.arange(40).repeat(2, 1)
    expected_positions[0, 10:] -= 10
    expected_positions[0, 21:] -= 11
    expected_positions[1, 31:] -= 31
    loader = configs.PreparedTokens.positions(ids, torch.tensor([1]))
    assert torch.equal(loader, expected_positions)
    ours = ours_of(model, config).eval()
    expected = loss_of(ours(ids, position_ids=expected_positions, use_cache=False).logits, ids)
    assert loss_of(logits(model, ids, expected_positions), ids) == pytest.approx(expected, abs=1e-4)
    assert loss_of(logits(model, ids), ids) != pytest.approx(expected, abs=1e-3)  # the control: one document


@torch.no_grad()
def test_a_compressed_vocabulary_is_ours(tmp_path):
    train_tokenizer(["Mem mem MEM memory Memory of of OF the The THE"] * 3, vocab_size=300, path=tmp_path)
    classes_V = torch.from_numpy(classes_of(str(tmp_path)))
    sizes = {"num_ids": len(classes_V), "num_classes": int(classes_V.max()) + 1, "fill_class": int(classes_V[0])}
    assert sizes["num_classes"] < sizes["num_ids"]
    memory = {**configs.debug_model().memory, "compression": "normalized"}
    config = configs.debug_model(memory=memory, **sizes)
    model, ids = drawn(config, tokenizer=str(tmp_path)), some_ids() % sizes["num_ids"]
    ours = ours_of(model, config).eval()
    expected = loss_of(ours(ids).logits, ids)
    assert loss_of(logits(model, ids), ids) == pytest.approx(expected, abs=1e-4)
    ours.model.memory.class_of_id.copy_(torch.arange(512) % sizes["num_classes"])  # the control: other classes
    assert loss_of(ours(ids).logits, ids) != pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_the_gates_that_are_logged_are_ours():
    config = configs.debug_model()
    model, ids = drawn(config), some_ids()
    ours, means = ours_of(model, config).eval(), {}
    for index, block in enumerate(ours.model.layers):
        for module in block.modules():
            if isinstance(module, Fusion):
                module.register_forward_pre_hook(
                    lambda module, given, index=index: means.update({index: float(module.gate(*given[:2])[0].mean())})
                )
    ours(ids)
    logits(model, ids)
    for index, mean in means.items():
        total, passes = model.layers[str(index)].fusion.gate_total.tolist()
        assert passes == 1 and total == pytest.approx(mean, abs=1e-5)
    assert list(means) == [1, 2] and abs(means[1] - means[2]) > 1e-4


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
    presets = {"engrammar_27b": "engram-27b", "engrammar_40b": "engram-40b", "m100": "100m"}
    counts = count_parameters(preset(presets[name]))
    with torch.device("meta"):
        model = getattr(configs, name)().model_spec.model.build()
    assert sum(parameter.numel() for parameter in model.parameters()) == (
        counts.total_parameters - counts.memory_parameters
    )
