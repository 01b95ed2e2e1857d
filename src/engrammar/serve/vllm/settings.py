"""Where a served model's rows are, read from vLLM's `--additional-config`, and what vLLM must not be asked to do."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig

from engrammar.config import check_setting
from engrammar.stores.serving import ServingSettings
from engrammar.train.sample import pool_store

KEY = "engrammar"  # our part of vLLM's additional config
SERVING = {field.name for field in fields(ServingSettings)} - {"where"}
POOL = {"name", "address"}
PATCHES = ("patches", "patches_on_request")
WITHOUT_MEMORY = {"self_test", *PATCHES}
SALTED = "engrammar.serve.vllm.choosing.salted_scheduler"  # vLLM imports it by this name
ALLOWED = sorted({"memory"} | WITHOUT_MEMORY | SERVING | POOL)


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """How a model is served."""

    serving: ServingSettings  # the stores and caches to open
    self_test: bool  # whether a few tokens are compared with transformers' model before anything is served
    patches: tuple[Path, ...]  # files of patches for all requests
    offered: tuple[Path, ...]  # and for requests that name them


def memory_settings(vllm_config: VllmConfig, tables: Path | None) -> MemorySettings:
    """Reads `--additional-config '{"engrammar": {"memory": "disk", ...}}'`; without it the rows are in RAM.

    The settings are those of `from_pretrained`. For tables on other machines, `memory` is "remote", and `name` and
    `address` are those of `engrammar generate`. `tables` is the folder whose tables they are; None for a model without
    a memory.

    Raises:
        ValueError: a setting is unknown or not allowed.
    """
    given = dict((vllm_config.additional_config or {}).get(KEY, {}))
    unknown = sorted(given.keys() - set(ALLOWED))
    if unknown:
        raise ValueError(f"additional_config[{KEY!r}] has {unknown[0]!r}; allowed: {', '.join(ALLOWED)}.")
    if tables is None and given.keys() - WITHOUT_MEMORY:
        raise ValueError(
            f"additional_config[{KEY!r}] has {min(given.keys() - WITHOUT_MEMORY)!r}, which is about a memory, and this "
            "model has none: leave it out."
        )
    self_test, where = given.pop("self_test", True), given.pop("memory", "ram")
    check_setting("self_test", self_test, isinstance(self_test, bool), "true or false")
    patches, offered = patch_files(vllm_config)
    for name in PATCHES:
        given.pop(name, None)
    pool = {key: given.pop(key) for key in sorted(POOL & given.keys())}
    if (where == "remote") != ("name" in pool) or ("address" in pool and "name" not in pool):
        raise ValueError("memory='remote' and `name` go together: name the tables as `engrammar table upload` did.")
    if where == "remote":
        assert tables is not None
        where = pool_store(tables, pool["name"], pool.get("address", "127.0.0.1:50051"))
    serving = ServingSettings(where=where, **given)
    return MemorySettings(serving=serving, self_test=self_test, patches=patches, offered=offered)


def patch_files(vllm_config: VllmConfig) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files of patches for all requests, and for those that name them.

    Raises:
        ValueError: a setting is not a list of files.
    """
    given = (vllm_config.additional_config or {}).get(KEY, {})
    for_all, offered = (given.get(name, []) for name in PATCHES)
    for name, paths in zip(PATCHES, (for_all, offered)):
        right = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        check_setting(name, paths, right, "a list of files")
    return tuple(map(Path, for_all)), tuple(map(Path, offered))


def check_can_choose(vllm_config: VllmConfig) -> None:
    """Raises a ValueError if requests cannot have patches of their own with these settings of vLLM."""
    scheduler = vllm_config.scheduler_config.scheduler_cls
    if vllm_config.cache_config.enable_prefix_caching and scheduler != SALTED:
        raise ValueError(
            f"patches_on_request: with scheduler_cls {scheduler!r} requests of different patches would share prefixes; "
            "leave it out, or add --no-enable-prefix-caching."
        )
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "patches_on_request: beside speculation vLLM does not say which request a token is of; leave one out."
        )


def check_engine(vllm_config: VllmConfig) -> None:
    """Raises a ValueError if vLLM is set up in a way in which the answers would be wrong, or were never compared."""
    parallel, speculation = vllm_config.parallel_config, vllm_config.speculative_config
    drafts: Any = None if speculation is None else speculation.method
    widths = _split_widths(vllm_config)
    refused = {
        "pipeline_parallel_size over 1: ids and residual branches do not reach the later stages": (
            parallel.pipeline_parallel_size > 1
        ),
        "decode or prefill context parallelism: a token's look-back would lie on another rank": (
            parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        f"tensor_parallel_size {parallel.tensor_parallel_size}: it does not divide {widths}": bool(widths),
        "KV transfer: whether the memory's state travels with the blocks was not tested": (
            vllm_config.kv_transfer_config is not None
        ),
        "prompt embeddings: the memory is addressed by token ids": vllm_config.model_config.enable_prompt_embeds,
        f"speculation by {drafts!r}: only 'ngram' was compared": drafts not in (None, "ngram"),
        "a device other than the CPU, or vLLM's newer runner: neither was tested": (
            vllm_config.device_config.device_type != "cpu" or vllm_config.use_v2_model_runner
        ),
    }
    wrong = [reason for reason, found in refused.items() if found]
    if wrong:
        raise ValueError(f"engrammar does not serve with {wrong[0]}; leave it out.")


def _split_widths(vllm_config: VllmConfig) -> str:
    """The settings of the model that tensor parallelism splits and cannot split evenly."""
    config, size = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
    split = ("num_attention_heads", "intermediate_size", "moe_intermediate_size")
    return ", ".join(f"{name}={getattr(config, name)}" for name in split if getattr(config, name, 0) % size)
