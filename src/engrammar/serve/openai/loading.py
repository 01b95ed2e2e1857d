"""Loads what is served: a folder or a name on the Hub, ours or any causal language model, with what is added to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engrammar.config import check_setting
from engrammar.edit import apply_patch, kept_files
from engrammar.edit.offering import offer_patch
from engrammar.model.configuration import EngrammarConfig, load_config
from engrammar.model.saving import local_folder
from engrammar.tables.headers import read_json
from engrammar.train.attached import load_base
from engrammar.train.recipe import BaseRecipe
from engrammar.train.sample import load, load_with_adapter

PLAIN = {"memory": "ram", "cache_rows": 0, "sharing": "none"}  # settings of a memory that say nothing


def load_served(
    name: str,
    *,
    adapter: Path | None = None,
    patches: Sequence[Path] = (),
    on_request: Sequence[Path] = (),
    device: str = "cpu",
    **serving: Any,
) -> tuple[Any, Any]:
    """Loads a model and its tokenizer.

    Args:
        name: a folder, or a name on the Hub.
        adapter: the folder of a memory that was attached to it.
        patches: files of patches, which are applied in this order; those kept in the folder are not by themselves.
        on_request: files of patches that requests may choose.
        device: where the model is; its rows are where `serving` says.
        serving: where the memory's tables are: see `ServingSettings`, whose `where` is `memory` here.

    Raises:
        ValueError: as `load`, `load_attached` and `apply_patch`; settings of a memory are given without one; or torch
            has no such device here.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    known = ("cpu",) if found is None else ("cpu", found.type)
    check_setting("device", device, device.partition(":")[0] in known, f"{', '.join(known)} on this machine")
    ours = is_ours(name)
    has_memory = adapter is not None or (ours and load_config(local_folder(name, {})).memory is not None)
    if not has_memory and any(serving.get(one, plain) != plain for one, plain in PLAIN.items()):
        raise ValueError(f"{name} has no memory, so nothing is said about where it is: leave that out.")
    if adapter is not None:
        model, tokenizer = load_with_adapter(name, adapter, **serving)
    elif not ours:
        model, tokenizer = load_base(BaseRecipe(model=name))
    else:
        model, tokenizer = load(local_folder(name, {}), **(serving if has_memory else {}))
    model.to(device)
    for patch in patches:
        apply_patch(model, patch, tokenizer)
    for patch in on_request:
        offer_patch(model, patch, tokenizer)
    return model.eval(), tokenizer


def with_kept(name: str, patches: Sequence[Path]) -> tuple[Path, ...]:
    """The files of the patches that are kept in a model's folder (`engrammar edit apply`), and of others."""
    return (*kept_files(name), *patches)


def is_ours(name: str) -> bool:
    """Whether a folder, or the Hub's model of a name, is one of our own checkpoints."""
    config = local_folder(name, {}) / "config.json"
    return config.is_file() and read_json(config).get("model_type") == EngrammarConfig.model_type


def read_token(path: Path | None) -> str | None:
    """The token in a file; None without a file.

    Raises:
        ValueError: the file is empty.
    """
    token = None if path is None else path.read_text().strip()
    if token == "":
        raise ValueError(f"{path} is empty: write a token into it.")
    return token
