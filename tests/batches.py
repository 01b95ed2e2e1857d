"""Requests through transformers' continuous batching, compared with full passes of the same model."""

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

LOGGER = "ContinuousBatchingLogger"


def generate(model, prompts: list[list[int]], new_tokens: int = 8, **settings):
    """What each request gives; by default 16 tokens a pass, so that prompts are cut into chunks."""
    chosen = {"num_blocks": 48, "max_batch_tokens": 16, "page_size": 4, "return_logprobs": True, **settings}
    sampling = {key: chosen.pop(key) for key in ("do_sample", "num_return_sequences") if key in chosen}
    generation = GenerationConfig(
        max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0, **{"do_sample": False, **sampling}
    )
    config = ContinuousBatchingConfig(**chosen)
    return model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=config, progress_bar=False
    ).values()


def full_pass(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def check(model, outputs, logits_of=full_pass) -> None:
    """Each log probability is that of a full pass."""
    for out in outputs:
        assert out.error is None
        ids = [*out.prompt_ids, *out.generated_tokens]
        logits = logits_of(model, ids)[len(out.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(out.generated_tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(out.logprobs), expected, rtol=0, atol=1e-5)
