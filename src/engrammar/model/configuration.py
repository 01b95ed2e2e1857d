"""The model's settings as a transformers config: DeepSeek-V3's, plus branches, memory, and the memory's geometry.

Letters: V ids of the vocabulary.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from transformers import DeepseekV3Config, PreTrainedTokenizerBase

from engrammar.addressing import derive_geometry
from engrammar.config import Geometry, MemoryConfig, check_setting
from engrammar.tables.headers import read_json
from engrammar.tables.shards import CODE
from engrammar.vocabulary import fingerprint

# Beside a checkpoint, for programs that have not imported us: trust_remote_code=True runs this one line.
CODE_LINE = "from engrammar import EngrammarConfig, EngrammarForCausalLM, EngrammarModel  # noqa: F401\n"
CODE_CLASSES = {
    "AutoConfig": "EngrammarConfig",
    "AutoModel": "EngrammarModel",
    "AutoModelForCausalLM": "EngrammarForCausalLM",
}


@strict
class EngrammarConfig(DeepseekV3Config):
    """Settings of `EngrammarForCausalLM`, besides DeepSeek-V3's (`hidden_size`, `n_routed_experts`, ...).

    Attributes:
        num_branches: residual branches M; 1 is the plain residual, more is mHC.
        hc_sinkhorn_iters, hc_eps: mHC's Sinkhorn iterations and epsilon.
        memory: a `MemoryConfig`, its `to_json()`, or a dict of settings over a dialect ({"dialect": NAME, ...}); kept
            as the dict. None is a model without memory.
        num_ids: the number of ids that the class map covers (`len(tokenizer)`); defaults to `vocab_size`.
        num_classes, fill_class: the number of classes of the compressed vocabulary, and the class of missing history.
            They are needed once, to derive `geometry`.
        geometry: `Geometry.to_json()`; derived if absent, then saved and never derived again.
        tokenizer_sha256: `vocabulary.fingerprint` of the tokenizer that the addresses belong to.
    """

    model_type = "engrammar"
    attribute_map: ClassVar[dict[str, str]] = {**DeepseekV3Config.attribute_map, "hc_mult": "num_branches"}

    num_branches: int = 1
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    n_group: int | None = 1
    topk_group: int | None = 1
    num_mtp_layers: int = 0
    memory: dict[str, Any] | MemoryConfig | None = None
    num_ids: int | None = None
    num_classes: int | None = None
    fill_class: int | None = None
    geometry: dict[str, Any] | None = None
    tokenizer_sha256: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_ids is None:
            self.num_ids = self.vocab_size
        if self.num_ids > self.vocab_size:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; the tokenizer has {self.num_ids} ids: give it at least that."
            )
        check_setting("num_branches", self.num_branches, self.num_branches >= 1, "1 or more")
        if self.n_routed_experts < (self.num_experts_per_tok or 0):
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok} of {self.n_routed_experts} experts.")
        if self.memory is not None:
            self._resolve_memory()
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: transformers would copy files of this package into each checkpoint that is saved again."""

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """transformers' `save_pretrained`; the folder also names our classes to programs that did not import us."""
        if type(self) is EngrammarConfig:
            self.auto_map = {auto: f"{Path(CODE).stem}.{name}" for auto, name in CODE_CLASSES.items()}
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / CODE).write_text(CODE_LINE)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def _resolve_memory(self) -> None:
        memory = self.memory_config
        assert memory is not None
        memory.check_model(self.num_hidden_layers, self.num_ids or 0)
        self.memory = memory.to_json()
        if self.geometry is None:
            num_classes, fill_class = self.num_classes, self.fill_class
            if memory.compression == "none":
                num_classes, fill_class = self.vocab_size, memory.fill_id
            if num_classes is None or fill_class is None:
                raise ValueError(
                    "memory.compression is 'normalized', so its addresses depend on the tokenizer: build the config "
                    "with EngrammarConfig.for_tokenizer(tokenizer, compress_vocabulary(tokenizer), ...), or give "
                    "num_classes and fill_class."
                )
            self.geometry = derive_geometry(memory, num_classes=num_classes, fill_class=fill_class).to_json()
        else:
            self._check_geometry(memory)
        # Beside its keys and values, a memory layer caches the last ids and, if it has one, the convolution's window.
        self.layer_types = [
            "hybrid" if layer in memory.layers else "full_attention" for layer in range(self.num_hidden_layers)
        ]
        self.number_of_conv_states = 2 if memory.conv_kernel else 1

    def _check_geometry(self, memory: MemoryConfig) -> None:
        """Checks that a saved geometry fits the settings. It is not derived again, so that addresses stay the same."""
        try:
            self.memory_geometry.check(memory)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The saved geometry does not fit the memory settings ({error}): a built model's memory cannot be "
                "resized; leave out `geometry` to build a new one."
            ) from error

    @property
    def memory_config(self) -> MemoryConfig | None:
        return None if self.memory is None else _memory_config(self.memory)

    @property
    def memory_geometry(self) -> Geometry:
        assert self.geometry is not None
        return Geometry.from_json(self.geometry)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' `from_dict`. A `memory` that is a place ("disk", a function) is left for the model."""
        where = (
            kwargs.pop("memory") if isinstance(kwargs.get("memory"), str) or callable(kwargs.get("memory")) else None
        )
        try:
            made = super().from_dict(config_dict, **kwargs)
        except (TypeError, KeyError, AttributeError, OverflowError, StrictDataclassError) as error:
            raise ValueError(f"These are not the settings of a model: {' '.join(str(error).split())}.") from error
        if where is None or not kwargs.get("return_unused_kwargs"):
            return made
        config, unused = made
        return config, unused | {"memory": where}

    @classmethod
    def for_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, classes_V: NDArray[np.int64] | None = None, **settings: Any
    ) -> Self:
        """A config whose vocabulary, special ids and memory addresses belong to `tokenizer`.

        Args:
            classes_V: `compress_vocabulary(tokenizer)`; needed if the memory compresses the vocabulary.

        Raises:
            ValueError: `classes_V` is missing or belongs to another tokenizer, or a setting is not allowed.
        """
        if classes_V is not None and len(classes_V) != len(tokenizer):
            raise ValueError(
                f"classes_V maps {len(classes_V)} ids, the tokenizer has {len(tokenizer)}: compress it anew."
            )
        settings.setdefault("vocab_size", len(tokenizer))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            settings.setdefault(name, getattr(tokenizer, name))
        settings |= {"num_ids": len(tokenizer), "tokenizer_sha256": fingerprint(tokenizer)}
        memory = None if settings.get("memory") is None else _memory_config(settings["memory"])
        if memory is not None and memory.compression == "normalized":
            if classes_V is None:
                raise ValueError(
                    "This memory is compressed: its addresses depend on which ids of the tokenizer read alike. Pass "
                    "classes_V=compress_vocabulary(tokenizer), and give the same to model.model.memory.set_classes; or "
                    "let EngrammarForCausalLM.from_preset(NAME, tokenizer=tokenizer) do all of it."
                )
            if memory.fill_id >= len(classes_V):
                raise ValueError(
                    f"memory.fill_id is {memory.fill_id}; the tokenizer has ids 0 to {len(classes_V) - 1}."
                )
            settings |= {"num_classes": int(classes_V.max()) + 1, "fill_class": int(classes_V[memory.fill_id])}
        return cls(**settings)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises a ValueError if this model's addresses belong to another tokenizer."""
        if self.tokenizer_sha256 is not None and fingerprint(tokenizer) != self.tokenizer_sha256:
            raise ValueError(
                f"This tokenizer ({len(tokenizer)} tokens) is not the one the model was built with: its memory "
                "would be read at wrong rows. Use the tokenizer saved beside the model. (After a resize for added "
                "tokens, set config.tokenizer_sha256 = vocabulary.fingerprint(tokenizer).)"
            )


def _memory_config(memory: MemoryConfig | dict[str, Any]) -> MemoryConfig:
    return memory if isinstance(memory, MemoryConfig) else MemoryConfig.from_json(memory)


def load_config(directory: Path, kind: type[EngrammarConfig] = EngrammarConfig) -> EngrammarConfig:
    """Reads the config of a checkpoint folder.

    Raises:
        ValueError: the folder has no config.json, or it does not describe a `kind`.
    """
    path = directory / "config.json"
    if not path.exists():
        raise ValueError(f"{directory} has no config.json: give a folder that training or save_pretrained wrote.")
    try:
        settings = read_json(path)
        if settings.get("model_type") != kind.model_type:
            raise ValueError(f"its model_type is not {kind.model_type}")
        made: EngrammarConfig = kind.from_dict(settings)
        return made
    except ValueError as error:
        raise ValueError(f"{path} is not the config of an engrammar model ({' '.join(str(error).split())}).") from error
