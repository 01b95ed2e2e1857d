"""Text from a trained model, with the tokenizer its addresses belong to."""

from pathlib import Path
from typing import Any


def load(directory: Path) -> tuple[Any, Any]:
    """The model and tokenizer of a folder that training wrote.

    Raises:
        ValueError: the folder is no checkpoint, a shard is damaged, or the tokenizer is not the model's.
    """
    from transformers import AutoTokenizer

    from engrammar.modeling import EngrammarForCausalLM

    if not (directory / "config.json").exists():
        raise ValueError(f"{directory} has no config.json: give a folder that training or save_pretrained wrote.")
    model = EngrammarForCausalLM.from_pretrained(directory)
    if not (directory / "tokenizer.json").exists():
        raise ValueError(
            f"{directory} has no tokenizer.json: copy the tokenizer that the model was trained with there."
        )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model.config.check_tokenizer(tokenizer)
    return model.eval(), tokenizer


def complete(
    directory: Path, prompt: str, max_new_tokens: int, temperature: float, top_p: float, num_beams: int, seed: int
) -> str:
    """The prompt and its continuation; `temperature` 0 is greedy."""
    from transformers import set_seed

    model, tokenizer = load(directory)
    set_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        **sampling,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)
