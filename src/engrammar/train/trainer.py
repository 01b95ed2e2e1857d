"""transformers' Trainer with one optimiser for matrices, memory rows and the rest, and loss-free expert balancing."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from engrammar.train.optimiser import build_optimiser, clip_grad_norm

IGNORED = -100  # label of a position that is not scored


class LoadBalancing(TrainerCallback):
    """Loss-free balancing (arXiv 2408.15664): after each step an expert's bias moves against its load.

    The bias enters the choice of experts only, never their weights, so no auxiliary loss is needed.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.routers = [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]
        self.loads = [torch.zeros(router.num_experts) for router in self.routers]
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        def count(index: int) -> Any:
            def hook(router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
                if router.training and torch.is_grad_enabled():
                    chosen = torch.bincount(output[2].flatten(), minlength=self.loads[index].numel())
                    self.loads[index] = self.loads[index].to(chosen.device) + chosen

            return hook

        self.hooks = [router.register_forward_hook(count(index)) for index, router in enumerate(self.routers)]

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        for router, load in zip(self.routers, self.loads):
            router.e_score_correction_bias += self.rate * torch.sign(load.mean() - load)
            load.zero_()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        for hook in self.hooks:
            hook.remove()


class EngrammarTrainer(Trainer):
    """Trains any model with (or without) memory tables.

    Args:
        optimiser: keyword arguments of `build_optimiser` besides lr and weight decay.
        balance_rate: step of loss-free balancing; 0 leaves it out.
        bytes_per_eval_token: UTF-8 bytes per token of the evaluation text; evaluation then reports bits per byte.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        optimiser: Mapping[str, Any] | None = None,
        balance_rate: float = 1e-3,
        bytes_per_eval_token: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, args=args, **kwargs)
        self.optimiser_settings = dict(optimiser or {})
        self.bytes_per_eval_token = bytes_per_eval_token
        if balance_rate:
            self.add_callback(LoadBalancing(model, balance_rate))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimiser(
                self.model if model is None else model,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                **self.optimiser_settings,
            )
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """The norm over dense gradients and touched rows together; torch's own refuses sparse gradients."""
        return clip_grad_norm(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> float:
        return float(clip_grad_norm(model.parameters(), math.inf) if grad_norm is None else grad_norm)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean cross entropy over every scored token, in nats; for the trainer's own set also bits per byte.

        A dict of sets is evaluated one by one, as transformers does.
        """
        if isinstance(eval_dataset, dict):
            each = {
                name: self.evaluate(part, None, f"{metric_key_prefix}_{name}") for name, part in eval_dataset.items()
            }
            return {name: value for metrics in each.values() for name, value in metrics.items()}
        loader = self.get_eval_dataloader(eval_dataset)
        model = self.accelerator.unwrap_model(self.model)
        started = time.perf_counter()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        training = model.training
        model.eval()
        with torch.no_grad():
            for batch in loader:
                totals += sum_cross_entropy(model, batch)
        model.train(training)
        totals = self.accelerator.reduce(totals, reduction="sum")
        nats, tokens = totals.tolist()
        seconds = time.perf_counter() - started
        metrics = {
            f"{metric_key_prefix}_loss": nats / tokens,
            f"{metric_key_prefix}_tokens_per_second": tokens / seconds,
        }
        if self.bytes_per_eval_token is not None and eval_dataset in (None, self.eval_dataset):
            bits = nats / tokens / math.log(2) / self.bytes_per_eval_token
            metrics[f"{metric_key_prefix}_bits_per_byte"] = bits
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def sum_cross_entropy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of the next-token cross entropy in nats, and how many tokens were scored: float64 [2]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False).logits
    targets = batch["labels"][:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.double().sum(), (targets != IGNORED).sum().double()])
