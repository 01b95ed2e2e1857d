"""A rank's work: a recipe, whose ranks write down the rows they hold when they save and after they load."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from engrammar.train.exchange import leave_processes
from engrammar.train.recipe import load_recipe
from engrammar.train.run import train
from engrammar.train.trainer import EngrammarTrainer


def write_down(trainer: EngrammarTrainer, notes: Path, what: str) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    placement, rows = trainer.placement, trainer.mixed_optimizer.rows
    placement.flush()
    held = {
        name: {"weight": table.detach().clone(), **{key: value.clone() for key, value in rows.state[table].items()}}
        for name, table in placement.tables.items()
    }
    torch.save(held, notes / f"{what}-{rank}.pt")


def train_and_note(recipe: Path, notes: Path, last: int = 0) -> None:
    """Trains; kills itself at step `last`, if one is given."""
    notes.mkdir(exist_ok=True)
    save, load = EngrammarTrainer._save_checkpoint, EngrammarTrainer._load_optimizer_and_scheduler
    step = EngrammarTrainer.training_step

    def saves(self, *args):
        write_down(self, notes, f"saved-{self.state.global_step}")
        save(self, *args)

    def loads(self, checkpoint):
        load(self, checkpoint)
        if checkpoint is not None:
            write_down(self, notes, "loaded")

    def dies(self, *args, **kwargs):
        if last and self.state.global_step == last:
            self._finish_sealing()
            self.accelerator.wait_for_everyone()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    EngrammarTrainer._save_checkpoint = saves
    EngrammarTrainer._load_optimizer_and_scheduler = loads
    EngrammarTrainer.training_step = dies
    train(load_recipe(str(recipe)))
    leave_processes()
