"""torchtitan's DeepSeek-V3 with memory and the multi-branch residual.

Letters: B batch, T tokens, M branches, D hidden width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3TransformerBlock, _build_dsv3_layers
from torchtitan.protocols.module import Module
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
    DeepseekV4UnweightedRMSNorm,
)

from engrammar.config import MemoryConfig, check_setting
from engrammar.fusion import Fusion
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.hyper import add_sublayer
from engrammar.titan.retrieval import Found, Retrieval, of_model

SCHEDULES = ("1F1B", "Interleaved1F1B", "GPipe", "LoopedBFS")  # of pipelines: one backward pass of everything


def _normal(std: float) -> dict[str, Callable[[Tensor], Any]]:
    return {"weight": lambda weight: nn.init.trunc_normal_(weight, std=std)}


class TitanFusion(Fusion, Module):
    """`Fusion` as a part of torchtitan."""

    gate_total: Tensor

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        memory: MemoryConfig
        dim: int
        branches: int
        std: float

    def __init__(self, config: Config) -> None:
        Fusion.__init__(self, config.memory, hidden_size=config.dim, num_branches=config.branches)
        plain = self.projection
        self.projection = Linear.Config(
            in_features=plain.in_features,
            out_features=plain.out_features,
            bias=plain.bias is not None,
            param_init={**_normal(config.std), "bias": nn.init.zeros_},
        ).build()

        self.register_buffer("gate_total", torch.zeros(2), persistent=False)

    def gate(self, hidden_BTMD: Tensor, embedding_BTE: Tensor) -> tuple[Tensor, Tensor]:
        """As `Fusion.gate`; its mean over tokens and branches, and the number of means, are summed for the logs."""
        gate_BTM, value_BTD = super().gate(hidden_BTMD, embedding_BTE)
        with torch.no_grad():
            mean = gate_BTM.float().mean()
            self.gate_total.add_(torch.stack([mean, torch.ones_like(mean)]))
        return gate_BTM, value_BTD

    def _init_self_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name != "conv_weight":
                nn.init.ones_(parameter)
            elif self.config.conv_init == "zero":
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.gate_total = torch.zeros(2, device=buffer_device or self.gate_total.device)


class _Norm(DeepseekV4UnweightedRMSNorm, Module):
    pass


class _Hyper(Module):
    """What torchtitan asks of transformers' hyper-connections: `settings` are what they read of a config."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        settings: dict[str, Any]
        std: float

    def __init__(self, config: Config) -> None:
        super().__init__(SimpleNamespace(**config.settings))
        self.std = config.std
        self.input_norm = _Norm(eps=config.settings["rms_norm_eps"])

    def _init_self_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("fn"):
                nn.init.normal_(parameter, std=self.std)
            else:
                (nn.init.zeros_ if name.endswith("base") else nn.init.ones_)(parameter)


class Connection(_Hyper, DeepseekV4HyperConnection):
    """The hyper-connection of a sub-layer."""

    @dataclass(kw_only=True, slots=True)
    class Config(_Hyper.Config):
        pass


class Head(_Hyper, DeepseekV4HyperHead):
    """Merges the branches at the end of the model."""

    @dataclass(kw_only=True, slots=True)
    class Config(_Hyper.Config):
        pass


class MemoryBlock(DeepSeekV3TransformerBlock):
    """A block of DeepSeek-V3, with memory where the layer has one, on one or more residual branches."""

    @dataclass(kw_only=True, slots=True)
    class Config(DeepSeekV3TransformerBlock.Config):
        fusion: TitanFusion.Config | None = None
        connection: Connection.Config | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.fusion = None if config.fusion is None else config.fusion.build()
        self.attn_connection = None if config.connection is None else config.connection.build()
        self.ffn_connection = None if config.connection is None else config.connection.build()

    def forward(self, streams_BTMD: Tensor, masks: Any, positions: Any = None, found: Found | None = None) -> Tensor:
        if self.fusion is not None:
            assert found is not None and found[0] is not None
            streams_BTMD = streams_BTMD + self.fusion(streams_BTMD, found[0], *found[1:])

        def attend(x_BTD: Tensor) -> Tensor:
            return self.attention(self.attention_norm(x_BTD), masks, positions)

        def feed(x_BTD: Tensor) -> Tensor:
            return (self.moe if self.moe_enabled else self.feed_forward)(self.ffn_norm(x_BTD))

        streams_BTMD = add_sublayer(streams_BTMD, self.attn_connection, attend)
        return add_sublayer(streams_BTMD, self.ffn_connection, feed)


class MemoryModel(DeepSeekV3Model):
    """DeepSeek-V3 whose blocks read memory."""

    @dataclass(kw_only=True, slots=True)
    class Config(DeepSeekV3Model.Config):
        retrieval: Retrieval.Config
        head: Head.Config | None = None
        branches: int = 1

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            check_parallelism(config)
            DeepSeekV3Model.Config.update_from_config(self, config=config, **kwargs)
            if not self.retrieval.tokenizer:
                self.retrieval.tokenizer = getattr(config, "hf_assets_path", "")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.retrieval = config.retrieval.build()
        self.branches = config.branches
        self.memory_layers = config.retrieval.memory.layers  # of the whole model
        self.head = None if config.head is None else config.head.build()

    def forward(
        self, tokens: Tensor, positions: Any = None, attention_masks: Any = None, ids: Tensor | None = None
    ) -> Tensor:
        """In a later stage of a pipeline, `tokens` are the streams of the stage before, and `ids` are given too."""
        found = {} if self.retrieval is None else self.retrieval(tokens if ids is None else ids, positions)
        streams_BTMD = tokens
        if self.tok_embeddings is not None:
            streams_BTMD = self.tok_embeddings(tokens).unsqueeze(2).repeat(1, 1, self.branches, 1)
        for name, layer in self.layers.items():
            streams_BTMD = layer(streams_BTMD, attention_masks, positions, found.get(int(name)))
        if self.norm is None:
            return streams_BTMD
        hidden_BTD = self.norm(streams_BTMD.squeeze(2) if self.head is None else self.head(streams_BTMD))
        return hidden_BTD if self._skip_lm_head else self.lm_head(hidden_BTD)


def check_parallelism(config: Any) -> None:
    """Raises a ValueError, and says what to set, where wrong rows would be read or nothing was shown to be right."""
    parallelism, training = config.parallelism, getattr(config, "training", None)
    check_pipeline(config)
    refused = {
        "tensor_parallel_degree": "ids are not cut over ranks, and a row would be looked up by each",
        "context_parallel_degree": "an n-gram would begin on another rank",
    }
    for name, why in refused.items():
        if getattr(parallelism, name) > 1:
            raise ValueError(
                f"parallelism.{name} is {getattr(parallelism, name)}, but with memory {why}: set it to 1, and use "
                "data_parallel_shard_degree, data_parallel_replicate_degree, expert_parallel_degree and "
                "pipeline_parallel_degree."
            )
    backend = parallelism.spmd_backend
    check_setting("parallelism.spmd_backend", backend, backend == "partial_dtensor", "'partial_dtensor'")
    if training is not None and not training.disable_cuda_graphs:
        raise ValueError("CUDA graphs cannot hold the exchange of rows: set --training.disable_cuda_graphs.")


def check_pipeline(config: Any) -> None:
    """Raises a ValueError, and says what to set, at schedules that leave rows without gradients."""
    parallelism = config.parallelism
    if parallelism.pipeline_parallel_degree == 1:
        return
    schedule = parallelism.pipeline_parallel_schedule_csv or parallelism.pipeline_parallel_schedule
    if schedule not in SCHEDULES:
        raise ValueError(
            f"The pipeline schedule {schedule!r} may compute gradients of parameters apart from those of inputs, and "
            f"rows are neither: set --parallelism.pipeline_parallel_schedule to one of {', '.join(SCHEDULES)}."
        )
    if config.validator.enable:
        raise ValueError("torchtitan's validator gives later stages no ids: set no --validator.enable with a pipeline.")


def titan_config(config: EngrammarConfig, *, attention: str = "flex", **retrieval: Any) -> MemoryModel.Config:
    """The model of torchtitan that computes what `EngrammarForCausalLM(config)` does.

    Args:
        attention: torchtitan's `attn_backend`.
        retrieval: settings of `Retrieval.Config`, such as `where`.
    """
    if config.memory_config is None:
        raise ValueError("This config has no memory: use torchtitan's own deepseek_v3.")
    dim, eps, std, branches = config.hidden_size, config.rms_norm_eps, config.initializer_range, config.num_branches
    rope = ComplexRoPE.Config(
        dim=config.qk_rope_head_dim,
        max_seq_len=config.max_position_embeddings,
        theta=config.rope_parameters["rope_theta"],
    )
    plain = _build_dsv3_layers(
        n_layers=config.num_hidden_layers, n_dense_layers=config.first_k_dense_replace, dim=dim,
        n_heads=config.num_attention_heads, q_lora_rank=config.q_lora_rank or 0, kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim, qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim, mscale=1.0, dense_hidden_dim=config.intermediate_size,
        moe_hidden_dim=config.moe_intermediate_size, num_experts=config.n_routed_experts,
        num_shared_experts=config.n_shared_experts, router_top_k=config.num_experts_per_tok,
        router_score_func="sigmoid", router_route_norm=config.norm_topk_prob,
        router_route_scale=config.routed_scaling_factor, attn_backend=attention, moe_comm_backend="standard",
        non_blocking_capacity_factor=None, rope=rope,
    )  # fmt: skip
    fusion = TitanFusion.Config(memory=config.memory_config, dim=dim, branches=branches, std=std)
    names = ("hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "hidden_size")
    hyper: dict[str, Any] = {"settings": {name: getattr(config, name) for name in names}, "std": std}
    connection = Connection.Config(**hyper) if branches > 1 else None
    layers = [
        MemoryBlock.Config(
            **{field.name: getattr(layer, field.name) for field in fields(layer)},
            fusion=fusion if index in config.memory_config.layers else None,
            connection=connection,
        )
        for index, layer in enumerate(plain)
    ]
    model = MemoryModel.Config(
        vocab_size=config.vocab_size,
        dim=dim,
        tok_embeddings=Embedding.Config(num_embeddings=config.vocab_size, embedding_dim=dim, param_init=_normal(std)),
        norm=RMSNorm.Config(normalized_shape=dim, param_init={"weight": nn.init.ones_}),
        lm_head=Linear.Config(in_features=dim, out_features=config.vocab_size, param_init=_normal(std)),
        layers=layers,
        retrieval=of_model(config, **retrieval),
        head=Head.Config(**hyper) if branches > 1 else None,
        branches=branches,
    )
    for _, norm, _, _ in model.traverse(RMSNorm.Config):
        norm.eps = eps
    return model
