"""Tiny models that new rows can steer, and facts for them."""

import torch

from attached_models import VOCABULARY, attached_model
from edited_models import OURS, WITH_MEMORY, classes
from engrammar.edit import Fact, RowSettings
from engrammar.model.modeling import EngrammarForCausalLM
from models import tiny_config, tiny_memory

WIDTH = 32  # of a row
FACTS = [
    Fact(subject="w3 w4 w5", prompt="w9 w3 w4 w5", object="w23"),
    Fact(subject="w6 w7 w8", prompt="w9 w6 w7 w8", object="w24"),
]
SETTINGS = RowSettings(num_contexts=1, num_paraphrases=0, num_others=2, steps=60, stop=0.5, most=40.0, kl=0.1)
KINDS = [OURS, WITH_MEMORY]
SEEDS = (0, 4, 8)  # not each of them steers our random model on every processor, but one does


def steerable(kind: str):
    """A tiny model with rows wide enough, and weights large enough, that rows can steer it."""
    if kind == OURS:
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "num_classes": int(classes().max()) + 1, "fill_class": int(classes()[2])}
        memory = {**tiny_memory("paper"), "head_dim": WIDTH}
        model = EngrammarForCausalLM(tiny_config("paper", 2, memory=memory, **sizes)).eval()
        model.model.memory.num_ids = VOCABULARY
        model.model.memory.set_classes(torch.from_numpy(classes()))
    else:
        model = attached_model("llama", {"head_dim": WIDTH})
    model.requires_grad_(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "memory" not in name and "engrammar" not in name:
                weight.mul_(20)
    return model
