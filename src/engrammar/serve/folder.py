"""The folder that vLLM serves a model from with an attached memory, or patches: links to the files, one config.

vLLM reads `config.json` like the base's own, and finds our class by the name of the architecture there. It is imported
without vLLM.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from engrammar.attach.attaching import require_attachment
from engrammar.edit import applied_patches, apply_patch
from engrammar.edit.written import kept_files
from engrammar.model.saving import local_folder
from engrammar.tables.sealed import written_beside
from engrammar.train.attached import load_base
from engrammar.train.recipe import BaseRecipe
from engrammar.train.sample import load_with_adapter

DENSE, EXPERTS = "EngrammarAttachedForCausalLM", "EngrammarAttachedMoEForCausalLM"  # architectures, for vLLM
KEY = "engrammar_attached"  # of config.json
ADAPTER, PATCHES, CONFIG = "adapter", "patches", "config.json"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # of a base on the Hub


def link_folder(model: str, adapter: Path | None, out: Path, patches: Sequence[Path] = ()) -> None:
    """Writes a folder for vLLM, which is whole or absent. Weights and tables are links: they stay where they are.

    Args:
        model: the base, a folder or a name on the Hub.
        adapter: the folder that `save_attached` or `engrammar attach` wrote.
        out: the folder to write.
        patches: files of patches.

    Raises:
        ValueError: the adapter or a patch is of another base; the base has patches kept with it, no weights as
            safetensors, reads more than text, or is one of our own models; or `out` is there already.
    """
    if adapter is None and not patches:
        raise ValueError("There is neither an adapter nor a patch: give vLLM the model itself.")
    if out.exists():
        raise ValueError(f"{out} is there already: choose another folder, or delete it.")
    if kept_files(model):
        raise ValueError(f"{model} has patches kept in its folder, which vLLM would leave out: `engrammar serve` it.")
    base = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, allow_patterns=FILES))
    config = json.loads((base / CONFIG).read_text())
    if config.get("model_type") == "engrammar":
        raise ValueError(
            f"{model} is one of our own models: give vLLM the model itself, and patches in --additional-config."
        )
    if not list(base.glob("*.safetensors")):
        raise ValueError(f"{model} has no weights as safetensors: `engrammar serve` it.")
    config |= _checked_config(model, adapter, patches)
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(out) as partial:
        partial.mkdir()
        for path in sorted(base.iterdir()):
            if path.is_file() and path.name != CONFIG and not path.name.startswith("."):
                (partial / path.name).symlink_to(path.resolve())
        if adapter is not None:
            (partial / ADAPTER).symlink_to(local_folder(str(adapter), {}).resolve(), target_is_directory=True)
        for name, path in zip(config[KEY]["patches"], patches):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).symlink_to(path.resolve())
        (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def _checked_config(model: str, adapter: Path | None, patches: Sequence[Path]) -> dict[str, Any]:
    """What the config of the folder has of its own, once the parts are found to be of this base."""
    if adapter is None:
        loaded, tokenizer = load_base(BaseRecipe(model=model))
    else:
        loaded, tokenizer = load_with_adapter(model, adapter, device="cpu", memory="disk")
    if loaded.config.get_text_config() is not loaded.config:
        raise ValueError(f"{model} reads more than text, which our part of vLLM does not: `engrammar serve` it.")
    for path in patches:
        apply_patch(loaded, path, tokenizer)
    names = [f"{PATCHES}/{name}.safetensors" for name in applied_patches(loaded)]
    memory = None
    if adapter is not None:
        (attached,) = require_attachment(loaded, None).memories().values()
        memory = attached.config.to_json()
    experts = any(name.rpartition(".")[2] == "experts" for name, _ in loaded.named_modules())
    return {
        "architectures": [EXPERTS if experts else DENSE],
        # vLLM keeps compiled code by the config, so what is compiled has to be in it.
        KEY: {"adapter": None if adapter is None else ADAPTER, "memory": memory, "patches": names},
    }


def adapter_of(folder: Path, config: Any) -> Path | None:
    """The adapter of a folder that `link_folder` wrote, if it has one; a ValueError if its links lead nowhere."""
    name = getattr(config, KEY, {}).get("adapter", ADAPTER)
    adapter = None if name is None else folder / name
    if adapter is not None and not adapter.is_dir():
        raise ValueError(f"{adapter} leads nowhere: write the folder again with `engrammar vllm`.")
    return adapter


def patches_of(folder: Path, config: Any) -> list[Path]:
    """The patches of a folder that `link_folder` wrote; raises a ValueError if their links lead nowhere."""
    paths = [folder / name for name in getattr(config, KEY, {}).get("patches", [])]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} leads nowhere: write the folder again with `engrammar vllm`.")
    return paths
