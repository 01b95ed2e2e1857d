"""The paper's backbone as a transformers model (paper section 2.4, appendix A).

Attention (MLA) and experts (DeepSeekMoE) are transformers' DeepSeek-V3 modules; ours are the multi-branch residual
(`hyper.py`) and the memory. All retrieval happens before block 0; a block with memory fuses its rows before attention.
Letters: B batch, T tokens, M branches, D hidden width, S positions of history.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm, DeepseekV3RotaryEmbedding
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from engrammar.memory import Memory, Retrieved
from engrammar.model.block import IDS_STATE, EngrammarBlock
from engrammar.model.configuration import EngrammarConfig
from engrammar.model.hyper import BranchMean, Collapse
from engrammar.model.pretrained import EngrammarPreTrainedModel
from engrammar.table import Tables
from engrammar.versions import slice_logits_to_keep

Masks = Tensor | Mapping[str, Tensor | None] | None  # one mask, or one for each kind of layer
ATTENTION, RECURRENT = "full_attention", "linear_attention"  # transformers' names of the masks of a hybrid block


class EngrammarModel(EngrammarPreTrainedModel):
    """Embedding, blocks and final norm. Without `config.memory` it is the plain MoE (or dense) model.

    With tables="external" the tables have no rows until `train.placement.place_tables` or `stores.serving.serve_tables`
    gives them a source. A subclass that looks ids up in another way overrides `looks_up`, `retrieve`, `embed` and
    `before_block`.
    """

    flat_tokens: ClassVar[bool] = False  # whether `retrieve` gives each token a history and a window of its own

    def __init__(self, config: EngrammarConfig, tables: Tables = "parameters") -> None:
        check_attention(config, self.flat_tokens)
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.memory: Memory | None = None
        if config.memory_config is not None:
            self.memory = Memory(
                config.memory_config,
                config.memory_geometry,
                num_ids=config.num_ids or config.vocab_size,
                vocab_size=config.vocab_size,
                tables=tables,
            )
        self.layers = nn.ModuleList([EngrammarBlock(config, index) for index in range(config.num_hidden_layers)])
        self.recorded = BranchMean()
        self.collapse = Collapse(config)
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekV3RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def looks_up(self) -> bool:
        """Whether the model looks up token ids, so that embeddings alone are not enough."""
        return self.memory is not None

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Masks = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        retrieved: Retrieved | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]  # mypy does not follow transformers
    ) -> MoeModelOutputWithPast:
        """Hidden states [B, T, D] of `input_ids` [B, T].

        `output_hidden_states` adds the embedding, and the mean of the branches after each block but the last.

        Args:
            retrieved: what `retrieve` returned for the same arguments, if it was called ahead.

        Raises:
            ValueError: a model with memory got no `input_ids`, or `retrieved` for other ids or another cache; an id is
                outside the vocabulary; the mask is not [B, positions]; or positions continue tokens that are not there.
        """
        self._check_inputs(input_ids, inputs_embeds)
        is_new = bool(use_cache) and past_key_values is None and (retrieved is None or not retrieved.own_history)
        if is_new:
            past_key_values = DynamicCache(config=self.config)
        if self.looks_up and retrieved is None:
            assert input_ids is not None
            retrieved = self.retrieve(input_ids, attention_mask, position_ids, past_key_values)
        elif retrieved is not None:
            self._check_retrieved(retrieved, input_ids, None if is_new else past_key_values)
            if is_new:
                self._begin_history(input_ids, attention_mask, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        inputs_embeds = self.embed(inputs_embeds, retrieved)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        attention = {
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask.get(ATTENTION) if isinstance(attention_mask, Mapping) else attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
            "position_ids": position_ids,
        }
        streams_BTMD = inputs_embeds.unsqueeze(2).repeat(1, 1, self.config.num_branches, 1)
        for layer, block in enumerate(self.layers):
            streams_BTMD = self.before_block(layer, streams_BTMD, retrieved)
            rows = () if retrieved is None else retrieved.of_layer(layer)
            streams_BTMD = block(streams_BTMD, *rows, past_key_values=past_key_values, **attention, **kwargs)
            if kwargs.get("output_hidden_states", self.config.output_hidden_states):
                self.recorded(inputs_embeds, streams_BTMD)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(self.collapse(streams_BTMD)), past_key_values=past_key_values
        )

    def retrieve(
        self,
        input_ids: Tensor,
        attention_mask: Masks = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Retrieved:
        """Starts reading the rows that `forward` needs for these arguments, to be passed to it as `retrieved`.

        With a cache, this call appends the ids to it, so call it once for each pass.
        """
        assert self.memory is not None
        mask_BT = new_positions(attention_mask, input_ids, past_key_values)
        history_BS = None
        if past_key_values is not None:
            seen = past_key_values.get_seq_length()
            if attention_mask is None and position_ids is not None:
                check_follow(position_ids, seen)
                position_ids = None  # they do not mark documents
            history_BS = self._keep_ids(input_ids, mask_BT, past_key_values)
            history_BS = history_BS if isinstance(seen, Tensor) or seen else None  # a static cache counts on its device
        return replace(self.memory.retrieve(input_ids, mask_BT, position_ids, history_BS), cache=past_key_values)

    def embed(self, inputs_embeds: Tensor, retrieved: Any) -> Tensor:
        """The input embeddings [B, T, D] that the first block reads."""
        return inputs_embeds

    def before_block(self, layer: int, streams_BTMD: Tensor, retrieved: Any) -> Tensor:
        """The residual streams that block `layer` reads."""
        return streams_BTMD

    def _check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
        if input_ids is None:
            if self.looks_up:
                raise ValueError("This model looks up token ids: pass input_ids, not inputs_embeds alone.")
            if inputs_embeds is None:
                raise ValueError("Pass input_ids or inputs_embeds.")
        elif input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and input_ids.numel():
            for token_id in (int(input_ids.min()), int(input_ids.max())):
                if not 0 <= token_id < self.config.vocab_size:
                    raise ValueError(
                        f"Token id {token_id} is outside the vocabulary of {self.config.vocab_size} ids: use the "
                        "tokenizer of this model, and an attention_mask for padding."
                    )

    def _check_retrieved(self, retrieved: Retrieved, input_ids: Tensor | None, cache: Cache | None) -> None:
        if self.memory is None or input_ids is None:
            raise ValueError("`retrieved` needs a model with memory, and the input_ids it was made for.")
        retrieved.check_made_for(input_ids)
        if retrieved.cache is not cache and not retrieved.own_history:  # what was given comes before flat tokens
            raise ValueError(
                "`retrieved` was made with another cache than this pass has, so its rows have another history: give "
                "`retrieve` and the model the same past_key_values."
            )
        if retrieved.own_history and self.memory.config.conv_kernel and not retrieved.windows:
            raise ValueError(
                "Each token was given a history of its own, but not a convolution window of its own: pass "
                "retrieved.windows too, or whole rows, or a cache."
            )

    def _begin_history(self, input_ids: Tensor | None, attention_mask: Masks, cache: Cache | None) -> None:
        """Keeps the ids of a pass whose rows were retrieved before it made its cache."""
        assert input_ids is not None and cache is not None
        self._keep_ids(input_ids, new_positions(attention_mask, input_ids, None), cache)

    def _keep_ids(self, input_ids: Tensor, mask_BT: Tensor | None, cache: Cache) -> Tensor:
        """Appends `input_ids` to the ids kept in the cache and returns the N-1 before them, -1 where there are none.

        The cache keeps id + 1, so that its initial zeros mean "none", which is what masked ids are as well.
        """
        assert self.memory is not None
        if mask_BT is not None:
            input_ids = input_ids.masked_fill(~mask_BT, -1)
        num_back = self.memory.config.max_ngram_size - 1
        stored = None
        for layer in self.memory.config.layers:  # in every memory layer, since a layer's states are cropped together
            if len(cache.layers) <= layer or not hasattr(cache.layers[layer], "conv_states"):
                raise ValueError("This cache cannot hold the memory's state: use DynamicCache(config=model.config).")
            stored = cache.update_conv_state(input_ids[:, None] + 1, layer, IDS_STATE, conv_kernel_size=num_back)
        assert stored is not None
        before = nn.functional.pad(stored[:, 0], (num_back, 0))[:, -(num_back + input_ids.shape[1]) :]
        return before[:, :num_back] - 1


def check_attention(config: EngrammarConfig, flat_tokens: bool) -> None:
    """Raises a ValueError in vLLM's Transformers backend as it is: n-grams would run from one request into the next."""
    if str(config._attn_implementation).startswith("vllm") and config.memory_config is not None and not flat_tokens:
        raise ValueError(
            "vLLM's Transformers backend cannot serve a model with memory as it is: it would read wrong rows. Install "
            "the plug-in (pip install 'engrammar[vllm]'), and leave out --model-impl and VLLM_PLUGINS."
        )


def check_follow(position_ids: Tensor, seen: int) -> None:
    """Raises a ValueError if positions are not those after the `seen` tokens of a cache."""
    follow = torch.arange(seen, seen + position_ids.shape[1], device=position_ids.device)
    if not torch.compiler.is_compiling() and not bool((position_ids == follow).all()):
        raise ValueError(
            f"position_ids do not go on from the {seen} tokens of the cache: pass use_cache=False if they tell packed "
            "documents, or the cache that holds the tokens before these."
        )


def new_positions(attention_mask: Masks, input_ids: Tensor, cache: Cache | None) -> Tensor | None:
    """The mask [B, T] of the new positions, the end of a mask [B, positions]; raises a ValueError at other shapes.

    `generate` with a static cache makes a mask for each kind of layer; the recurrent layers' is that of new positions.
    """
    seen = 0
    if isinstance(attention_mask, Mapping):
        attention_mask = attention_mask.get(RECURRENT)
    elif cache is not None and attention_mask is not None:
        seen = int(cache.get_seq_length())
    if attention_mask is None:
        return None
    shape = (input_ids.shape[0], seen + input_ids.shape[1])
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != shape:
        raise ValueError(
            f"A model that looks up ids needs an attention_mask of shape [batch, positions] = {list(shape)}, cached "
            "positions included."
        )
    return attention_mask[:, -input_ids.shape[1] :].bool()


class EngrammarForCausalLM(EngrammarPreTrainedModel, GenerationMixin):
    """`EngrammarModel` with a language-model head; works with `generate`, Trainer and the Auto classes.

    Attributes:
        chunked_loss: in training, take the loss without ever holding logits of all tokens: the same loss to rounding,
            in less memory and, on a CPU, half the time. The output has no logits then. (With LoRA or hooks on the head,
            or labels that are shifted already, the loss is taken from logits.)
    """

    backbone_class: ClassVar[type[EngrammarModel]] = EngrammarModel
    chunked_loss: bool = False
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: EngrammarConfig, tables: Tables = "parameters") -> None:
        super().__init__(config)
        if tables == "external":
            self._keys_to_ignore_on_load_unexpected = {r"memory\.tables\."}
        self.model = self.backbone_class(config, tables)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def retrieve(self, input_ids: Tensor, **arguments: Any) -> Retrieved:
        """As `EngrammarModel.retrieve`."""
        return self.model.retrieve(input_ids, **arguments)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Masks = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        retrieved: Retrieved | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]  # mypy does not follow transformers
    ) -> MoeCausalLMOutputWithPast:
        """Logits [B, T, vocabulary] and, with `labels` [B, T] (-100 is ignored), the mean cross entropy in nats.

        `retrieved` and errors are as in `EngrammarModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            retrieved=retrieved,
            **kwargs,
        )
        hidden_BTD = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits, loss = None, None
        chunks = labels is not None and self.training and self.chunked_loss
        if chunks and {"ignore_index", "shift_labels"}.isdisjoint(kwargs) and is_plain_linear(self.lm_head):
            assert labels is not None
            loss = chunked_cross_entropy(hidden_BTD, self.lm_head.weight, labels, kwargs.get("num_items_in_batch"))
        else:
            logits = self.lm_head(hidden_BTD)
        if labels is not None and loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes what its weight says and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is nn.Linear and "forward" not in vars(module) and not any(hooks)


def chunked_cross_entropy(
    hidden_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Next-token cross entropy in nats, -100 ignored: a mean, or the sum over `num_items`, as in transformers."""
    targets_N = F.pad(labels_BT, (0, 1), value=-100)[:, 1:].flatten()
    loss = F.linear_cross_entropy(
        hidden_BTD.flatten(0, 1),
        head_VD,
        targets_N,
        reduction="mean" if num_items is None else "sum",
        options=nn.LinearCrossEntropyOptions(),
    )
    return loss if num_items is None else loss / num_items


AutoConfig.register("engrammar", EngrammarConfig)
AutoModel.register(EngrammarConfig, EngrammarModel)
AutoModelForCausalLM.register(EngrammarConfig, EngrammarForCausalLM)


def model_class(config: EngrammarConfig) -> type[EngrammarForCausalLM]:
    """The causal model class that is registered with transformers for this kind of config."""
    return AutoModelForCausalLM._model_mapping[type(config)]
