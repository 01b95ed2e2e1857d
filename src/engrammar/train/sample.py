"""Text from a trained model, with the tokenizer its addresses belong to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


def load(directory: Path, **serving: Any) -> tuple[Any, Any]:
    """The model and tokenizer of a folder that training wrote.

    Args:
        serving: `memory`, `cache_rows`, `on_missing` and `deadline` of `EngrammarForCausalLM.from_pretrained`.

    Raises:
        ValueError: the folder is no checkpoint, a shard is damaged, or the tokenizer is not the model's.
    """
    from transformers import AutoTokenizer

    from engrammar.model.configuration import load_config
    from engrammar.model.modeling import EngrammarForCausalLM

    load_config(directory)
    model = EngrammarForCausalLM.from_pretrained(directory, **serving)
    if not (directory / "tokenizer.json").exists():
        raise ValueError(
            f"{directory} has no tokenizer.json: copy the tokenizer that the model was trained with there."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # tokenizers and transformers raise many kinds
        reason = str(error).split("\n")[0]
        raise ValueError(f"The tokenizer in {directory} cannot be read ({reason}): copy it again.") from error
    model.config.check_tokenizer(tokenizer)
    return model.eval(), tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a prompt; `temperature` 0 is greedy."""

    max_new_tokens: int = 60
    temperature: float = 0.8
    top_p: float = 0.95
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "over 0, up to 1"),
            ("num_beams", self.num_beams >= 1, "1 or more"),
        ):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {allowed}.")


def complete(model: Any, tokenizer: Any, prompt: str, sampling: Sampling) -> str:
    """The prompt and its continuation."""
    from transformers import set_seed

    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs.input_ids.numel() == 0:
        raise ValueError("The prompt is empty: give at least one token to go on from.")
    set_seed(sampling.seed)
    how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    ids = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=sampling.max_new_tokens,
        num_beams=sampling.num_beams,
        **(how if sampling.temperature > 0 else {"do_sample": False}),
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)
