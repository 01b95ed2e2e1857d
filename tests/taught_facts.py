"""Facts for a tiny random model whose MLPs are strong enough to be written into, and what it says of them."""

import torch

from attached_models import base_model, tokenizer
from engrammar.edit import Fact

FACTS = [
    Fact(subject="w3 w4", prompt="w9 w3 w4", object="w20"),
    Fact(subject="w5 w6", prompt="w9 w5 w6 w10", object="w21 w24"),
    Fact(subject="w7 w8", prompt="w7 w8", object="w22"),
    Fact(subject="w12", prompt="w11 w12 w10 w9", object="w23"),
]


def strong_model():
    """A random Llama of four blocks, whose residual stream is what its blocks add."""
    model = base_model("llama")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(20)
    return model


@torch.no_grad()
def says(model, fact: Fact, worded=lambda prompt: prompt) -> bool:
    """Whether a model generates the object after the prompt, greedily, from its cache."""
    ids = tokenizer()(worded(fact.prompt), return_tensors="pt").input_ids
    words = tokenizer()(fact.object).input_ids
    made = model.generate(ids, max_new_tokens=len(words), min_new_tokens=len(words), do_sample=False, pad_token_id=0)
    return made[0, ids.shape[1] :].tolist() == words


def all_bits(model) -> list[torch.Tensor]:
    """Copies of all weights."""
    return [parameter.detach().clone() for parameter in model.parameters()]
