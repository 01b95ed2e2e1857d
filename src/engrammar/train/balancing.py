"""Loss-free balancing: after each step the router's biases move against the load of the experts."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter


class LoadBalancing(TrainerCallback):
    """Loss-free balancing (arXiv 2408.15664): after each step, an expert's bias moves against its load.

    The bias affects only the choice of experts, never their weights, so no auxiliary loss is needed.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.routers = [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]
        self.loads = [torch.zeros(router.num_experts) for router in self.routers]
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        def count(index: int) -> Any:
            @torch.compiler.disable
            def hook(router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
                if router.training and torch.is_grad_enabled():
                    chosen = torch.bincount(output[2].flatten(), minlength=self.loads[index].numel())
                    self.loads[index] = self.loads[index].to(chosen.device) + chosen

            return hook

        self.hooks = [router.register_forward_hook(count(index)) for index, router in enumerate(self.routers)]

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        for index, router in enumerate(self.routers):
            load = self.loads[index] = self.loads[index].to(router.e_score_correction_bias.device)
            if dist.is_initialized():
                dist.all_reduce(load)
            router.e_score_correction_bias += self.rate * torch.sign(load.mean() - load)
            load.zero_()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        for hook in self.hooks:
            hook.remove()
