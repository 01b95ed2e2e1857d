"""Tiny random models that read images and text, and prompts for them."""

import functools

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attached_models import PAD, SMALL, VOCABULARY, random_ids

IMAGE, NUM_PATCHES = 60, 4  # the id in whose place an image stands, once for each of its patches
TEXT = {name: size for name, size in SMALL.items() if name not in ("tie_word_embeddings", "attn_implementation")}
TEXT["head_dim"] = 16
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
FAMILIES: dict[str, dict] = {
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "vision_config": VISION,
        "image_token_id": IMAGE,
        "mm_tokens_per_image": NUM_PATCHES,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
    },
    "qwen3_vl": {
        "text_config": TEXT | {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
        "image_token_id": IMAGE,
        "video_token_id": 59,
        "vision_start_token_id": 58,
        "vision_end_token_id": 57,
    },
    "gemma4": {
        "text_config": TEXT
        | {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 6,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
        "vision_config": None,
        "audio_config": None,
        "image_token_id": IMAGE,
        "video_token_id": 59,
        "audio_token_id": 58,
    },
}
READ_IMAGES = [family for family, settings in FAMILIES.items() if settings["vision_config"] is not None]


@functools.cache
def _weights(family: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return _empty(family).state_dict()


def _empty(family: str) -> PreTrainedModel:
    config = CONFIG_MAPPING[family](**FAMILIES[family], attn_implementation="eager")
    return AutoModelForImageTextToText.from_config(config).eval()


def image_model(family: str) -> PreTrainedModel:
    model = _empty(family)
    model.load_state_dict(_weights(family))
    return model


def text_twin(family: str) -> PreTrainedModel:
    """The causal LM of the same family and weights that reads text alone."""
    model = image_model(family)
    twin = AutoModelForCausalLM.from_config(model.config.get_text_config()).eval()
    twin.model.load_state_dict(model.model.language_model.state_dict())
    twin.lm_head.load_state_dict(model.lm_head.state_dict())
    return twin


def prompt_with_images(family: str, rows: int, tokens: int = 14, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random text with an image in it, a little later in each row."""
    ids = text_ids(rows, tokens, seed)
    for row in range(rows):
        ids[row, 3 + row : 3 + row + NUM_PATCHES] = IMAGE
    draw = torch.Generator().manual_seed(seed)
    if family == "qwen3_vl":
        pixels = torch.randn(rows * 4 * NUM_PATCHES, 3 * 2 * 16 * 16, generator=draw)
    else:
        pixels = torch.randn(rows, 3, 16, 16, generator=draw)
    return with_pixels(family, ids, pixels)


def with_pixels(family: str, ids: torch.Tensor, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments of a pass over ids that hold an image in each row."""
    given = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}
    if family == "qwen3_vl":
        grid = torch.tensor([[1, 4, 4]] * len(ids))
        given |= {"image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}
    return given


def text_ids(rows: int, tokens: int, seed: int = 3) -> torch.Tensor:
    """Random ids in which no image stands, nor padding."""
    return random_ids(rows, tokens, seed) % 50 + 2
