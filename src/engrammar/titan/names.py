"""Weights of torchtitan's model under the names of `EngrammarForCausalLM`, and back.

Letters: E experts, F inner width of an expert, D hidden width.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import EngrammarForCausalLM, model_class
from engrammar.titan.model import MemoryModel
from engrammar.titan.retrieval import classes_of

# Parts of names, torchtitan's and ours; a longer one stands before one that it contains.
PARTS = (
    ("tok_embeddings.", "model.embed_tokens."),
    ("retrieval.tables.", "model.memory.tables."),
    (".attention.wkv_a.", ".self_attn.kv_a_proj_with_mqa."),
    (".attention.kv_norm.", ".self_attn.kv_a_layernorm."),
    (".attention.wkv_b.", ".self_attn.kv_b_proj."),
    (".attention.wq_a.", ".self_attn.q_a_proj."),
    (".attention.q_norm.", ".self_attn.q_a_layernorm."),
    (".attention.wq_b.", ".self_attn.q_b_proj."),
    (".attention.wq.", ".self_attn.q_proj."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".attention_norm.", ".attn_residual.norm."),
    (".ffn_norm.", ".mlp_residual.norm."),
    (".attn_connection.", ".attn_residual.connection."),
    (".ffn_connection.", ".mlp_residual.connection."),
    (".moe.shared_experts.w1.", ".mlp.shared_experts.gate_proj."),
    (".moe.shared_experts.w3.", ".mlp.shared_experts.up_proj."),
    (".moe.shared_experts.w2.", ".mlp.shared_experts.down_proj."),
    (".moe.expert_bias_E", ".mlp.gate.e_score_correction_bias"),
    (".moe.router.gate.", ".mlp.gate."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
)
OUTSIDE = ((r"^layers\.", "model.layers."), (r"^norm\.", "model.norm."), (r"^head\.", "model.collapse.head."))
EXPERTS, OUR_EXPERTS = ".moe.routed_experts.inner_experts.", ".mlp.experts."
NOT_WEIGHTS = re.compile(r"tokens_per_expert|rope|class_of_id")
NOT_OF_MODEL = re.compile(r"(optimizer|lr_scheduler|dataloader|train_state)\b")  # in torchtitan's checkpoints


def to_ours(state: dict[str, Any]) -> dict[str, Any]:
    """torchtitan's weights under our names; gate and up of the experts become one [E, 2F, D].

    The class map of a compressed vocabulary is none of torchtitan's weights.
    """
    found: dict[str, Any] = {}
    for name, value in state.items():
        if NOT_WEIGHTS.search(name) or name.endswith("w3_EFD"):
            continue
        ours = name
        for theirs, own in PARTS:
            ours = ours.replace(theirs, own)
        for pattern, own in OUTSIDE:
            ours = re.sub(pattern, own, ours)
        if name.endswith("w1_EFD"):
            ours = ours.replace(EXPERTS, OUR_EXPERTS).replace("w1_EFD", "gate_up_proj")
            value = torch.cat([value, state[name.replace("w1_EFD", "w3_EFD")]], 1)
        elif name.endswith("w2_EDF"):
            ours = ours.replace(EXPERTS, OUR_EXPERTS).replace("w2_EDF", "down_proj")
        found[ours] = value
    return found


def to_titan(state: dict[str, Any]) -> dict[str, Any]:
    """Our weights under torchtitan's names."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        if NOT_WEIGHTS.search(name):
            continue
        theirs = name
        if name.endswith(".gate_up_proj"):
            stem = re.sub(r"^model\.", "", name).replace(OUR_EXPERTS, EXPERTS).removesuffix("gate_up_proj")
            found[f"{stem}w1_EFD"], found[f"{stem}w3_EFD"] = value.chunk(2, 1)
            continue
        if OUR_EXPERTS in name:
            theirs = theirs.replace(OUR_EXPERTS, EXPERTS).replace("down_proj", "w2_EDF")
        theirs = theirs.replace("model.collapse.head.", "head.")
        for other, own in PARTS:
            theirs = theirs.replace(own, other)
        found[re.sub(r"^model\.", "", theirs)] = value
    return found


class Adapter(StateDictAdapter):
    """What torchtitan's checkpoints in Hugging Face's format call."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return to_ours(state_dict)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return to_titan(hf_state_dict)


@torch.no_grad()
def ours_of(model: MemoryModel, config: EngrammarConfig) -> EngrammarForCausalLM:
    """The same model as one of ours, to be saved, served, edited and measured. For a model that is whole on one rank.

    Raises:
        ValueError: the weights are not those of `config`.
    """
    ours = model_class(config)(config)
    memory, classes_V = ours.model.memory, model.retrieval.class_of_id
    if memory is not None and memory.class_of_id is not None and classes_V is not None:
        memory.class_of_id.copy_(classes_V)
    return _filled(ours, model.state_dict())


def ours_at(checkpoint: Path, config: EngrammarConfig, tokenizer: str = "") -> EngrammarForCausalLM:
    """As `ours_of`, from a checkpoint that torchtitan wrote in any layout, such as `outputs/checkpoint/step-1000`.

    Its list of contents is a pickle: read checkpoints of your own only.

    Args:
        tokenizer: the folder of the tokenizer whose ids are compressed.
    """
    ours = model_class(config)(config)
    memory = ours.model.memory
    if memory is not None and memory.config.compression != "none":
        memory.set_classes(torch.from_numpy(classes_of(tokenizer)))
    return _filled(ours, read_checkpoint(checkpoint, leave_out=NOT_OF_MODEL))


def read_checkpoint(checkpoint: Path, leave_out: re.Pattern[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint of torchtitan, whole; names that begin with `leave_out` are not read."""
    reader = FileSystemReader(checkpoint)
    state = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in reader.read_metadata().state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata) and not (leave_out and leave_out.match(name))
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def _filled(ours: EngrammarForCausalLM, weights: dict[str, Any]) -> EngrammarForCausalLM:
    state: dict[str, Tensor] = to_ours(weights)
    memory = ours.model.memory
    if memory is not None and memory.class_of_id is not None:
        state["model.memory.class_of_id"] = memory.class_of_id
    given, own = state.keys(), ours.state_dict().keys()
    if given != own:
        raise ValueError(f"The weights are of another model than config: they differ in {min(given ^ own)}.")
    ours.load_state_dict(state)
    return ours
