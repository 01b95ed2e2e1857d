"""What is trained of a model whose base may be frozen: a checkpoint's file, without the base.

Rows that are placed outside the model are no parameters of it; `Placement` writes them.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engrammar.tables.shards import BACKBONE, WHOLE
from engrammar.train.sharded import OPTIMIZER


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their names."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(folder: Path, model: nn.Module) -> None:
    """Writes the trained parameters into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: parameter.detach().cpu().contiguous() for name, parameter in trained_parameters(model).items()}
    save_file(values, folder / WHOLE)


def load_trained(folder: Path, model: nn.Module) -> None:
    """Reads what `save_trained` wrote into the same parameters.

    Raises:
        ValueError: the folder holds none, or those of a run that trained other parameters.
    """
    trained = trained_parameters(model)
    path = next((folder / name for name in (BACKBONE, WHOLE) if (folder / name).exists()), None)
    saved = {} if path is None else load_file(path)
    if saved.keys() != trained.keys():
        name = min(saved.keys() ^ trained.keys())
        raise ValueError(f"{folder} is of another run: {name} is trained in one of the two only.")
    with torch.no_grad():
        for name, value in saved.items():
            trained[name].copy_(value)


def check_resumable(folder: Path) -> None:
    """Raises a ValueError if a checkpoint lacks its optimizer's state, which would begin anew in silence."""
    if not any((folder / name).exists() for name in ("optimizer.pt", OPTIMIZER)):
        raise ValueError(
            f"{folder} has no optimizer's state (save_only_model): load its model and train anew, or resume from "
            "another checkpoint."
        )
