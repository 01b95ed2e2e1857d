"""A rank's work: a recipe under FSDP2, which accelerate must be made to use on a CPU."""

from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from process_worker import train_and_note
from torch.distributed.tensor import DTensor

from engrammar.train.trainer import EngrammarTrainer


def force_fsdp() -> None:
    """On a CPU accelerate forgets the plug-in, and trains DDP in silence."""
    start = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plugin = fsdp_plugin or self._shared_state.get("fsdp_plugin")
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init


def train_in_shards(recipe: Path, notes: Path, last: int = 0) -> None:
    force_fsdp()
    step = EngrammarTrainer.training_step

    def checked(self, *args, **kwargs):
        names = dict(self.model.named_parameters())
        assert len(names) > 20 and all(isinstance(param, DTensor) for param in names.values())
        assert not any("tables" in name for name in names)
        trained = {id(param) for group in self.mixed_optimizer.param_groups for param in group["params"]}
        assert {id(param) for param in names.values()} < trained  # and the rows
        return step(self, *args, **kwargs)

    EngrammarTrainer.training_step = checked
    train_and_note(recipe, notes, last)
