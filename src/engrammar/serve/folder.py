"""The folder that vLLM serves a model with its attached memory from: links to the base and to the adapter, one config.

vLLM reads `config.json` like the base's own, and finds our class by the name of the architecture there. It is imported
without vLLM.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from engrammar.attach.attaching import require_attachment
from engrammar.edit.kept import kept_files
from engrammar.model.saving import local_folder
from engrammar.tables.sealed import written_beside
from engrammar.train.sample import load_with_adapter

DENSE, EXPERTS = "EngrammarAttachedForCausalLM", "EngrammarAttachedMoEForCausalLM"  # architectures, for vLLM
KEY = "engrammar_attached"  # of config.json
ADAPTER, CONFIG = "adapter", "config.json"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # of a base on the Hub


def link_folder(model: str, adapter: Path, out: Path) -> None:
    """Writes a folder for vLLM, which is whole or absent. Weights and tables are links: they stay where they are.

    Args:
        model: the base, a folder or a name on the Hub.
        adapter: the folder that `save_attached` or `engrammar attach` wrote.
        out: the folder to write.

    Raises:
        ValueError: the adapter is of another base; the base has patches kept with it, no weights as safetensors, or is
            one of our own models; or `out` is there already.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: choose another folder, or delete it.")
    if kept_files(model):
        raise ValueError(f"{model} has patches kept in its folder, which vLLM would leave out: `engrammar serve` it.")
    loaded, _ = load_with_adapter(model, adapter, device="cpu", memory="disk")
    (attached,) = require_attachment(loaded, None).memories().values()
    experts = any(name.rpartition(".")[2] == "experts" for name, _ in loaded.named_modules())
    base = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, allow_patterns=FILES))
    config = json.loads((base / CONFIG).read_text())
    if not list(base.glob("*.safetensors")) or config.get("model_type") == "engrammar":
        raise ValueError(f"{model} is one of our own models, or has no weights as safetensors: `engrammar serve` it.")
    config["architectures"] = [EXPERTS if experts else DENSE]
    # vLLM keeps compiled code by the config, so what is compiled has to be in it.
    config[KEY] = {"adapter": ADAPTER, "memory": attached.config.to_json()}
    source = local_folder(str(adapter), {}).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(out) as partial:
        partial.mkdir()
        for path in sorted(base.iterdir()):
            if path.is_file() and path.name != CONFIG and not path.name.startswith("."):
                (partial / path.name).symlink_to(path.resolve())
        (partial / ADAPTER).symlink_to(source, target_is_directory=True)
        (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def adapter_of(folder: Path, config: Any) -> Path:
    """The adapter of a folder that `link_folder` wrote; raises a ValueError if its links lead nowhere."""
    adapter = folder / getattr(config, KEY, {}).get("adapter", ADAPTER)
    if not adapter.is_dir():
        raise ValueError(f"{adapter} leads nowhere: write the folder again with `engrammar vllm`.")
    return adapter
