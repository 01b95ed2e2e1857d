"""Before anything is served: a few tokens through vLLM's layers and ours, compared with transformers' plain model.

Letters: T tokens of a request, V ids of the vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import compute_layer_kv_cache_shape_bytes

from engrammar.edit.applying import edits_of, without_patches
from engrammar.off import adding_modules, memory_off
from engrammar.serve.vllm.state import StateLayer

LENGTHS = (29, 17)  # tokens of two requests
# Passes of a batch: for each request in it, its first and last position. Chunks, single steps, both in either order.
PASSES = (((0, 0, 11), (1, 0, 1)), ((1, 1, 14), (0, 11, 12)), ((0, 12, 13), (1, 14, 15)), ((0, 13, 29), (1, 15, 17)))
IDS = torch.int32  # vLLM's ids; compiled code believes their size without looking
FIRST_BLOCK = 1  # block 0 is vLLM's empty one
# What the logits may differ by, as a share of their own spread.
TOLERANCE = {torch.float32: 1e-4}
ROUNDED, TIMES, WRONG = 0.05, 3.0, 0.4  # of other dtypes: at least, of what the base alone differs by, and at most

logger = init_logger("vllm.plugins.engrammar")  # vLLM prints what is below its own name


@final
class SelfTest:
    """Compares a served model, once, with transformers' model of the same checkpoint."""

    def __init__(self, served: Any) -> None:
        self.served, self.done = served, False

    @torch.inference_mode()
    def __call__(self) -> None:
        """Raises a ValueError if any logit differs by more than rounding."""
        if self.done:
            return
        self.done = True
        vocab_size = self.served.text_config.vocab_size
        generator = torch.Generator().manual_seed(0)
        requests = [torch.randint(vocab_size, (length,), generator=generator) for length in LENGTHS]
        if self.served.patcher is not None:
            self.served.patcher.put_keys(requests)
        allowed = TOLERANCE.get(self.served.model_config.dtype)
        plain = self.served.plain_model().eval()
        expected, alone = _logits(plain, requests), [] if allowed else _logits_alone(plain, requests)
        del plain
        self._compile()
        difference = distance(self._served(requests), expected)
        if allowed is None:
            rounding = distance(self._served(requests, adding=False), alone)
            allowed = min(max(ROUNDED, TIMES * rounding), WRONG)
        if not difference <= allowed:
            raise ValueError(
                f"engrammar's self-test: logits in vLLM differ from transformers' by {difference:.2g} of their spread "
                f"({allowed:.2g} is allowed), so this vLLM would serve wrong tokens with these settings. Please report "
                "it with the command you ran."
            )
        logger.info("engrammar's self-test: logits differ from transformers' by %.2g of their spread", difference)

    def _compile(self) -> None:
        """Runs a pass of the largest size without a cache, as vLLM does to compile: it traces the first pass."""
        num_tokens = self.served.vllm_config.scheduler_config.max_num_batched_tokens
        positions = torch.zeros(num_tokens, dtype=torch.long, device=self.served.device_config.device)
        with set_forward_context(None, self.served.vllm_config, num_tokens=num_tokens):
            self.served(positions.to(IDS), positions)

    def _served(self, requests: list[Tensor], adding: bool = True) -> list[Tensor]:
        """The logits of each request; without `adding` the states of memory and patches are nowhere in the cache."""
        config, device = self.served.vllm_config, self.served.device_config.device
        layers = {
            name: layer
            for name, layer in config.compilation_config.static_forward_context.items()
            if isinstance(layer, AttentionLayerBase)
        }
        logits = [torch.empty(len(ids_T), self.served.text_config.vocab_size) for ids_T in requests]
        with own_caches(layers, config) as builders:
            for parts in PASSES:
                batch = [(requests[which], first, end) for which, first, end in parts]
                ids = torch.cat([ids_T[first:end] for ids_T, first, end in batch]).to(device, IDS)
                positions = torch.cat([torch.arange(first, end) for _, first, end in batch]).to(device)
                wheres = {name: where_in(parts, positions, layers[name].kv_cache.shape[2]) for name in layers}
                metadata = {
                    name: builder.build(0, wheres[name])
                    for name, builder in builders.items()
                    if adding or not isinstance(layers[name], StateLayer)
                }
                slots = {name: where.slot_mapping for name, where in wheres.items()}
                with set_forward_context(metadata, config, num_tokens=len(ids), slot_mapping=slots):
                    hidden = self.served(ids, positions)
                computed = self.served.compute_logits(hidden).float().split([end - first for _, first, end in parts])
                for (which, first, end), part in zip(parts, computed):
                    logits[which][first:end] = part
        return logits


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The root mean square of the differences, as a share of the expected logits' spread about each token's mean."""
    found_TV, expected_TV = torch.cat(found), torch.cat(expected)
    spread = expected_TV.std(-1, correction=0).square().mean().sqrt()
    return float((found_TV - expected_TV).square().mean().sqrt() / spread)


def _logits(model: Any, requests: list[Tensor]) -> list[Tensor]:
    return [model(ids_T[None], use_cache=False).logits[0].float() for ids_T in requests]


def _logits_alone(model: Any, requests: list[Tensor]) -> list[Tensor]:
    """The logits where neither memory nor patches add anything: what they differ by in vLLM is rounding."""
    with ExitStack() as stack:
        if adding_modules(model):
            stack.enter_context(memory_off(model))
        if edits_of(model) is not None:
            stack.enter_context(without_patches(model))
        return _logits(model, requests)


@contextmanager
def own_caches(layers: dict[str, Any], config: Any) -> Iterator[dict[str, Any]]:
    """Gives each layer a small cache for the time of the test; yields what makes its metadata."""
    before = {name: (layer.kv_cache, getattr(layer, "isa", None)) for name, layer in layers.items()}
    builders = {}
    for name, layer in layers.items():
        spec = layer.get_kv_cache_spec(config)
        num_blocks = FIRST_BLOCK + sum(-(-length // spec.block_size) for length in LENGTHS)
        raw = torch.zeros(compute_layer_kv_cache_shape_bytes(spec, num_blocks), dtype=torch.int8)
        layer.kv_cache = raw.to(config.device_config.device).view(spec.dtype)
        if isinstance(layer, StateLayer):
            layer.kv_cache.fill_(float("nan"))  # what nobody wrote must not be read
        builder = layer.get_attn_backend().get_builder_cls()
        builders[name] = builder(spec, [name], config, config.device_config.device)
    try:
        yield builders
    finally:
        for name, (cache, isa) in before.items():
            layers[name].kv_cache = cache
            if isa is not None:
                layers[name].isa = isa


def where_in(parts: tuple[tuple[int, int, int], ...], positions: Tensor, block_size: int) -> CommonAttentionMetadata:
    """vLLM's metadata of a pass in which the requests' blocks follow each other, the last request's first."""
    per_request = [-(-length // block_size) for length in LENGTHS]
    first_block = [FIRST_BLOCK + sum(per_request[which + 1 :]) for which in range(len(LENGTHS))]
    table = torch.zeros((len(parts), max(per_request)), dtype=torch.int32)
    slots = []
    for row, (which, first, end) in enumerate(parts):
        table[row, : per_request[which]] = first_block[which] + torch.arange(per_request[which])
        slots.append(first_block[which] * block_size + torch.arange(first, end))
    lengths = torch.tensor([end - first for _, first, end in parts], dtype=torch.int32)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    device = positions.device
    ends = torch.tensor([end for *_, end in parts], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=ends.to(device),
        num_reqs=len(parts),
        num_actual_tokens=len(positions),
        max_query_len=int(lengths.max()),
        max_seq_len=int(ends.max()),
        block_table_tensor=table.to(device),
        slot_mapping=torch.cat(slots).to(device),
        positions=positions,
    )
