"""What transformers asks of our models: initial values, what can be recorded, how the vocabulary is resized.

Letters: V ids of the vocabulary.
"""

from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

from engrammar.fusion import Fusion
from engrammar.memory import Memory
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.hyper import BranchMean
from engrammar.model.presets import preset
from engrammar.model.saving import SavedModel
from engrammar.table import MemoryTable, draw_rows_
from engrammar.vocabulary import compress_vocabulary


class EngrammarPreTrainedModel(SavedModel, DeepseekV3PreTrainedModel):
    """The base of our models, with and without a head (abstract)."""

    config: EngrammarConfig
    config_class = EngrammarConfig
    _no_split_modules = ("EngrammarBlock",)
    _can_compile_fullgraph = False  # ids are checked, and rows may be read from elsewhere
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        **DeepseekV3PreTrainedModel._can_record_outputs,
        "hidden_states": BranchMean,
    }
    _keys_to_ignore_on_load_unexpected: Any = None  # not DeepSeek-V3's, which hides weights of a block 61

    @classmethod
    def from_preset(cls, name: str, *, tokenizer: Any, **overrides: Any) -> Self:
        """A freshly initialized model of a preset for `tokenizer`, with its vocabulary compressed and class map set.

        Args:
            name, tokenizer, overrides: see `engrammar.preset`, which makes the config.

        Raises:
            ValueError: there is no such preset or setting, or the tokenizer does not fit the memory.
        """
        classes_V = compress_vocabulary(tokenizer)
        model = cls(preset(name, tokenizer=tokenizer, classes_V=classes_V, **overrides))
        memory = model.base_model.memory
        if memory is not None and memory.class_of_id is not None:
            memory.set_classes(torch.from_numpy(classes_V))
        return model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing: see `EngrammarConfig.register_for_auto_class`."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """Must be False: for custom code, transformers skips `_init_weights` on modules without missing weights.

        Our `_init_weights` itself skips parameters that were loaded.
        """
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """True, since the experts are DeepSeek-V3's; transformers would look for them in the source of our module."""
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Plain ("eager") experts by default: transformers' own default adds in another order."""
        return super().get_correct_experts_implementation(requested_experts or "eager")

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """transformers' `resize_token_embeddings`; every id that stays keeps its address in the memory.

        The number of classes is part of the hash, so a new id cannot have its own class. It takes the class of missing
        history, as padding ids of the vocabulary do. If the new ids are a tokenizer's new tokens, also set
        `config.tokenizer_sha256 = vocabulary.fingerprint(tokenizer)`.

        Raises:
            ValueError: the vocabulary would lose an id that the memory's settings name.
        """
        memory = self.base_model.memory
        if memory is not None and new_num_tokens is not None:
            memory.check_vocabulary(new_num_tokens)
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.num_ids = min(self.config.num_ids, self.config.vocab_size)
        if memory is not None:
            memory.resize_vocabulary(self.config.vocab_size, embedding.weight.device)
        return embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekV4HyperConnection):
            init.normal_(module.fn, mean=0.0, std=std)
            init.zeros_(module.base)
            init.ones_(module.scale)
        elif isinstance(module, DeepseekV4HyperHead):
            init.normal_(module.hc_fn, mean=0.0, std=std)
            init.zeros_(module.hc_base)
            init.ones_(module.hc_scale)
        elif isinstance(module, MemoryTable):
            module.init_seed = int(torch.randint(2**62, ()))
            if module.weight is not None and not getattr(module.weight, "_is_hf_initialized", False):
                draw_rows_(module.weight, seed=module.init_seed, first_row=0, std=std)
        elif isinstance(module, Memory) and module.class_of_id is not None:
            init.copy_(module.class_of_id, module.first_classes(len(module.class_of_id)))
        elif isinstance(module, Fusion):
            for name, norm in module.named_parameters():
                if name.endswith("_norm"):
                    init.ones_(norm)
            if module.config.conv_kernel:
                if module.config.conv_init == "zero":
                    init.zeros_(module.conv_weight)
                else:
                    init.kaiming_uniform_(module.conv_weight, a=5**0.5)
