"""Saves attached memories as adapters, and attaches saved ones."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from engrammar.attach.attaching import check_name, only_memory, put
from engrammar.attach.blocks import find_decoder
from engrammar.attach.fingerprints import check_base, fingerprint_of
from engrammar.attach.folder import load_memory, read_adapter, write_adapter
from engrammar.model.saving import DOWNLOAD, SERVING, local_folder, take_serving
from engrammar.vocabulary import fingerprint, require_tokenizer


def save_attached(model: nn.Module, folder: str | Path, name: str | None = None) -> None:
    """Saves one attached memory as a folder of safetensors and JSON, without the base.

    The folder is whole or absent; an adapter that is there is replaced. `engrammar table` and `engrammar verify` take
    it.

    Args:
        name: which memory; None is the only one.

    Raises:
        ValueError: there is no such memory, or there are several and no name; or the folder holds other things.
        OSError: the disk is full or fails; what was there is still there.
    """
    write_adapter(Path(folder), *only_memory(model, name), fingerprint_of(find_decoder(model)))


def load_attached(
    model: nn.Module,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
    **settings: Any,
) -> nn.Module:
    """Attaches a saved memory to the model that it was saved from, in place.

    Args:
        folder: a folder that `save_attached` wrote, or the name of one on the Hub.
        tokenizer: if given, it must be the one that the memory was attached with.
        name: what the memory is called here; None is its name when it was saved.
        settings: `memory`, "ram", "disk" or a function that opens the store of a table, and what belongs to it
            (`ServingSettings`); without it the rows are parameters. `verify=True` compares every byte with its
            checksum. `revision`, `cache_dir`, `token`, `local_files_only` and `force_download` are the Hub's.

    Returns:
        The model that was given.

    Raises:
        ValueError: the model or the tokenizer is another one, and what differs is named; a file is missing or damaged;
            or a setting is unknown.
    """
    unknown = settings.keys() - {"memory", "verify", *SERVING, *DOWNLOAD}
    if unknown:
        raise ValueError(f"load_attached has no setting {min(unknown)!r}; see its documentation.")
    path = local_folder(str(folder), settings)
    saved, decoder = read_adapter(path), find_decoder(model)
    name = saved.name if name is None else name
    check_name(decoder.host, name)
    check_base(decoder, saved.base, str(folder))
    if tokenizer is not None:
        require_tokenizer(tokenizer)
        if fingerprint(tokenizer) != saved.place.tokenizer_sha256:
            raise ValueError(
                f"{folder} was made with another tokenizer than this one of {len(tokenizer)} tokens: its rows would be "
                "read wrongly; give the base's own tokenizer."
            )
    serving = take_serving(settings)
    put(decoder, load_memory(path, saved.place, serving, verify=bool(settings.get("verify"))), name)
    return model
