"""The backbone with a rival in memory's place: separate transformers model classes, registered on import.

Letters: B batch, T tokens, M branches, D hidden width, X whatever a rival looks up.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.cache_utils import Cache

from engrammar.memory import Retrieved, masked_ids
from engrammar.model.budget import Share, solve_budget
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.modeling import (
    EngrammarForCausalLM,
    EngrammarModel,
    EngrammarPreTrainedModel,
    Masks,
    new_positions,
)
from engrammar.model.presets import preset
from engrammar.table import Tables
from engrammar.train.recipe import ModelRecipe
from engrammar.train.run import build_config
from engrammar_lab.rivals import Backbone, Rival, RivalConfig, rival_from_json


@strict
class EngrammarRivalConfig(EngrammarConfig):
    """`EngrammarConfig` with `rival` in place of `memory`: {"kind": NAME, sizes}, see `RIVALS`."""

    model_type = "engrammar_rival"

    rival: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.memory is not None or self.rival is None:
            raise ValueError("A rival stands in memory's place: set memory to null, and rival to one.")
        self.rival = rival_from_json(self.rival).to_json()
        super().__post_init__(**kwargs)


def backbone_of(config: EngrammarConfig) -> Backbone:
    """What a rival needs to know of its model; `eos_token_id` ends its texts."""
    end = config.eos_token_id
    return Backbone(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        norm_eps=config.rms_norm_eps,
        end_ids=() if end is None else (end,) if isinstance(end, int) else tuple(end),
    )


@dataclass(frozen=True, kw_only=True)
class RivalRead(Retrieved):
    """What a rival looked up by ids before the first block."""

    read_BTX: Tensor | None = None


class RivalPreTrainedModel(EngrammarPreTrainedModel):
    config_class = EngrammarRivalConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Rival):
            module.init_weights(self.config.initializer_range)


class EngrammarRivalModel(RivalPreTrainedModel, EngrammarModel):
    """`EngrammarModel` with `config.rival` in memory's place."""

    looks_up = True

    def __init__(self, config: EngrammarRivalConfig, tables: Tables = "parameters") -> None:
        super().__init__(config, tables)
        assert config.rival is not None
        self.rival: Rival = rival_from_json(config.rival).build(backbone_of(config))
        self.post_init()

    def retrieve(
        self,
        input_ids: Tensor,
        attention_mask: Masks = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> RivalRead:
        """What the rival looks up by these ids.

        Raises:
            ValueError: n-grams would have to continue from a cache.
        """
        if self.rival.looks_up == "ngrams" and past_key_values is not None and past_key_values.get_seq_length():
            raise ValueError("An n-gram rival reads whole rows, not on from a cache: pass use_cache=False.")
        mask_BT = new_positions(attention_mask, input_ids, past_key_values)
        continued = past_key_values is not None
        ids_BT, _, starts_BT = masked_ids(input_ids, mask_BT, position_ids, continued=continued)
        return RivalRead(input_ids=input_ids, read_BTX=self.rival.read(ids_BT, starts_BT))

    def embed(self, inputs_embeds: Tensor, retrieved: RivalRead) -> Tensor:
        return self.rival.embed(inputs_embeds, retrieved.read_BTX)

    def before_block(self, layer: int, streams_BTMD: Tensor, retrieved: RivalRead) -> Tensor:
        return self.rival.before(layer, streams_BTMD, retrieved.read_BTX)


class EngrammarRivalForCausalLM(RivalPreTrainedModel, EngrammarForCausalLM):
    """`EngrammarRivalModel` with a language-model head."""

    backbone_class = EngrammarRivalModel


@dataclass(frozen=True, kw_only=True)
class RivalShare(Share):
    """A rival whose `solved` setting takes the share of the parameters that memory would have."""

    rival: RivalConfig

    def sized(self, size: int) -> "RivalShare":
        return replace(self, rival=replace(self.rival, **{self.rival.solved: max(size, self.rival.smallest)}))

    def check(self, size: int, rho: float) -> None:
        if size < self.rival.smallest:
            raise ValueError(
                f"At rho={rho} there is no room for rival.{self.rival.solved}={self.rival.smallest}, its least."
            )

    def table_parameters(self, plain: EngrammarConfig) -> int:
        with torch.device("meta"):
            return self.rival.build(backbone_of(plain)).weight.numel()

    def configure(self, settings: dict[str, Any]) -> EngrammarConfig:
        return EngrammarRivalConfig(**(settings | {"rival": self.rival.to_json()}))


def build_lab_config(recipe: ModelRecipe, tokenizer: Any, classes_V: Any) -> EngrammarConfig:
    """Like `train.run.build_config`, but also for recipes whose `model.settings.rival` names a rival."""
    settings = dict(recipe.settings)
    rival = settings.pop("rival", None)
    if rival is None:
        return build_config(recipe, tokenizer, classes_V)
    if recipe.memory != "none":
        raise ValueError(f"model.memory is {recipe.memory!r}; allowed: none, beside a model.settings.rival.")
    plain = preset(recipe.preset, tokenizer=tokenizer, **(settings | {"memory": None}))
    return solve_budget(plain, RivalShare(rival=rival_from_json(rival)), rho=recipe.rho)


AutoConfig.register(EngrammarRivalConfig.model_type, EngrammarRivalConfig)
AutoModel.register(EngrammarRivalConfig, EngrammarRivalModel)
AutoModelForCausalLM.register(EngrammarRivalConfig, EngrammarRivalForCausalLM)
