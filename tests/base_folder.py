"""A folder with a small language model of transformers' own, and its tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from image_models import VISION
from texts import make_texts

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def write_base(folder: Path, *, num_tokens: int = 300) -> Path:
    """A Llama of three blocks that knows no text yet."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=num_tokens, special_tokens=["<end>"], initial_alphabet=alphabet)
    raw.train_from_iterator(make_texts(200), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", chat_template=CHAT)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_image_base(folder: Path) -> Path:
    """The same with eyes: a LLaVA."""
    num_ids = len(AutoTokenizer.from_pretrained(write_base(folder)))
    torch.manual_seed(0)
    text, vision = {"model_type": "llama", "vocab_size": num_ids + 1, **SIZES}, {"model_type": "clip_vision_model"}
    config = LlavaConfig(text_config=text, vision_config=VISION | vision, image_token_index=num_ids)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder
