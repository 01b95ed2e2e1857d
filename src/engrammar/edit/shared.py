"""Hidden states that all facts share, kept on a disk between runs: reading them takes most of the time of a first fact.

A file is found only by a request that would read the same states to the bit, and is checked whole; one that is damaged
is read anew from the model, with a warning. Letters: N prompts, D hidden width.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from engrammar.edit.patch import Base
from engrammar.tables.headers import Requirement, header_bytes, load_json, parse_header
from engrammar.tables.sealed import reason_of, written_beside

VERSION = 1  # another one where the same texts are read in another way (`states`)
METADATA = "engrammar_states"
logger = logging.getLogger(__name__)


@final
class SharedStates:
    """A folder of hidden states of one model. It can be deleted at any time.

    Args:
        known_ND: states that were read just now. They tell a model from one that differs from it anywhere, such as in
            what is attached to it, which the fingerprints of a base do not see.
    """

    def __init__(self, folder: Path, base: Base, block: int, known_ND: Tensor) -> None:
        self.folder = folder
        capability = torch.backends.cpu.get_cpu_capability()
        self.about: dict[str, Any] = {
            "version": VERSION,
            "base": asdict(base),
            "block": block,
            "known": _sha256(known_ND),
            "computed by": [torch.__version__, str(torch.get_num_threads()), capability],
        }

    def read(self, texts: Sequence[str], compute: Callable[[], Tensor]) -> Tensor:
        """The states [N, D] of texts, from the folder if it has them; if not, they are computed and kept there."""
        texts_sha256 = hashlib.sha256(json.dumps([*texts]).encode()).hexdigest()
        about = json.dumps({**self.about, "texts": texts_sha256}, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.safetensors"
        if path.exists():
            try:
                return _parsed(path, about, len(texts))
            except (ValueError, OSError) as error:
                logger.warning("%s It is read from the model again.", error)
        states_ND = compute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_beside(path) as partial:
                told = {"about": about, "sha256": _sha256(states_ND)}
                partial.write_bytes(save({"states": states_ND.contiguous()}, {METADATA: json.dumps(told)}))
        except OSError as error:
            logger.warning("%s cannot be kept (%s): the next run reads it anew.", path, reason_of(error, self.folder))
        return states_ND


def _parsed(path: Path, about: str, num_texts: int) -> Tensor:
    """The states in a file; raises a ValueError if it is not what it should be in every byte."""
    data, require = path.read_bytes(), Requirement(path)
    length = header_bytes(data[:8], len(data), require)
    parts, metadata = parse_header(data[8 : 8 + length], len(data), require)
    told = load_json(metadata.get(METADATA, "null").encode(), require)
    require(isinstance(told, dict) and told.get("about") == about, "it was kept for something else")
    require([*parts] == ["states"], f"it should hold states alone, but holds {', '.join(parts) or 'nothing'}")
    part = parts["states"]
    fits = part.dtype == "F32" and len(part.shape) == 2 and part.shape[0] == num_texts
    require(fits, f"its states are {part.dtype} {[*part.shape]}")
    states_ND = torch.from_numpy(np.frombuffer(data, "<f4", -1, part.start).reshape(part.shape).astype(np.float32))
    require(told.get("sha256") == _sha256(states_ND), "its sha256 is not that of its states")
    return states_ND


def _sha256(states_ND: Tensor) -> str:
    return hashlib.sha256(states_ND.contiguous().numpy().tobytes()).hexdigest()
