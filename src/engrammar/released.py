"""Qwen4-Exp models of transformers, which read their n-gram tables from our stores (docs/released-tables.md).

transformers holds such a table as one weight, and the release's has 51 billion numbers. Here `Memory` computes the
addresses and rows come from any tier, so the table is neither loaded nor allocated. The rest is transformers' own
code. Outputs are equal to the bit, as the tests compare.
Letters: B batch, T tokens, S = N-1 ids of history, E width of a token's rows.
"""

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Cache, PreTrainedModel
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen4_exp

from engrammar.memory import Memory, memory_of
from engrammar.model.saving import SERVING
from engrammar.stores.serving import ServingSettings, StoredTables, require_tables_of, serve_tables
from engrammar.table import Rows
from engrammar.tables.folder import TableFolder, open_tables
from engrammar.tables.released.files import Settings
from engrammar.tables.released.qwen import describe_memory

IDS = 2  # which of a cache's states of a layer holds the last ids


@final
class Reads:
    """The reads of forward passes in progress, by the tensor of ids that all layers of a pass are given."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.started = WeakIdKeyDictionary()

    @torch.compiler.disable  # stores are not traced: a graph breaks here, and at each layer's wait
    def start(self, _block: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Starts the reads of all layers; a hook of the first block, before it runs."""
        ids_BT, cache = kwargs["ple_input_ids"], kwargs.get("past_key_values")
        history_BS = self.history(cache, self.memory.config.layers[0])
        self.started[ids_BT] = dict(self.memory.retrieve(ids_BT.long(), history=history_BS).waits)

    def of_layer(self, layer: int, ids_BT: Tensor, cache: Cache | None) -> Callable[[], Rows]:
        """The read of a layer's rows; it is started now if it was not: a block that is computed anew in backward."""
        started = self.started.get(ids_BT, {})
        if layer in started:
            wait: Callable[[], Rows] = started.pop(layer)
            return wait
        table, source = self.memory.table(layer), self.memory.source
        assert source is not None, "a pass starts its reads in the first block, which refuses"
        rows_BTH = self.memory.addresses(ids_BT.long(), history=self.history(cache, layer))[layer]
        return source.read([{table.name: rows_BTH}])[0][table.name]

    def history(self, cache: Cache | None, layer: int) -> Tensor | None:
        """The ids before a pass, [B, S]; None if it begins the text."""
        seen_BT = None if cache is None else cache.get_conv_state(layer, state_idx=IDS)
        if seen_BT is None:
            return None
        num_ids = self.memory.config.max_ngram_size - 1
        last_BS = seen_BT[:, -num_ids:]
        return nn.functional.pad(last_BS, (num_ids - last_BS.shape[1], 0), value=self.memory.config.fill_id)


@final
class StoredNGrams(nn.Module):
    """Takes the place of a `Qwen4ExpTextNGramEmbedding`: the same ids, state in the cache and embeddings, no weight."""

    def __init__(self, layer: int, reads: Reads) -> None:
        super().__init__()
        self.layer, self.reads = layer, reads

    @torch.compiler.disable
    def forward(self, input_ids: Tensor, past_key_values: Cache | None) -> Tensor:
        """Returns embedding_BTE. A position that lacks rows (`on_missing="skip"`) takes nothing: all its rows are 0."""
        wait = self.reads.of_layer(self.layer, input_ids, past_key_values)
        if past_key_values is not None:
            self._remember(input_ids, past_key_values)
        embedding_BTE, missing_BT = wait()
        return embedding_BTE if missing_BT is None else embedding_BTE.masked_fill(missing_BT[..., None], 0)

    def _remember(self, ids_BT: Tensor, cache: Cache) -> None:
        """Keeps the last ids in the cache, as transformers' module does: a short beginning is padded with end ids."""
        config = self.reads.memory.config
        num_ids = config.max_ngram_size - 1
        if cache.get_conv_state(self.layer, state_idx=IDS) is None:
            ids_BT = nn.functional.pad(ids_BT, (max(num_ids - ids_BT.shape[1], 0), 0), value=config.fill_id)
        cache.update_conv_state(ids_BT.long(), self.layer, state_idx=IDS, conv_kernel_size=num_ids)


def memory_for(text: Any) -> Memory:
    """A `Memory` without rows, which addresses what a Qwen4-Exp text model's own n-gram tables hold.

    Raises:
        ValueError: the model has no table, has given it up already, or addresses it otherwise than its config says.
    """
    if memory_of(text) is not None:
        raise ValueError("This model's tables are served already: load it again to serve others.")
    config, geometry = describe_memory(Settings("The model's config", text.config.to_dict()), "bf16")
    for index, layer in enumerate(config.layers):
        embedding = text.layers[layer].ple.ple_embedding
        multipliers = embedding.layer_multipliers
        derived = multipliers.new_tensor(geometry.multipliers[index])
        same = multipliers.is_meta or torch.equal(multipliers, derived)
        if embedding.head_vocab_sizes != list(geometry.head_sizes(index)) or not same:
            raise ValueError("The model's config is not the one that its n-gram tables were built with: load it again.")
    size = text.config.vocab_size
    return Memory(config, geometry, num_ids=size, vocab_size=size, tables="external")


def drop_tables(text: Any, memory: Memory) -> None:
    """Drops a text model's n-gram tables; its blocks ask `memory`, which becomes a part of it, for their rows."""
    reads = Reads(memory)
    for layer in memory.config.layers:
        text.layers[layer].ple.ple_embedding = StoredNGrams(layer, reads)
    text.memory = memory
    text.layers[0].register_forward_pre_hook(reads.start, with_kwargs=True)


def _text_model(model: nn.Module) -> Any:
    texts = [module for module in model.modules() if isinstance(module, qwen4_exp.Qwen4ExpTextModel)]
    if len(texts) != 1:
        raise ValueError(f"{type(model).__name__} is no Qwen4-Exp model of transformers: give one with a text model.")
    return texts[0]


def serve_released(model: nn.Module, folder: Path, settings: ServingSettings) -> StoredTables:
    """Lets a Qwen4-Exp model that is in memory read its rows from a table folder, and drops its own tables.

    `Qwen4ExpForCausalLM.from_pretrained` below loads a model without ever allocating them.

    Args:
        model: transformers' own model, or a model that contains it. Its `save_pretrained` then refuses.
        folder: what `engrammar table import` made of the model's files.
        settings: the stores and caches to open.

    Raises:
        ValueError: the model is no Qwen4-Exp model or has no table; or the folder's tables are not this model's, or
            damaged. The model is then as it was.
    """
    text = _text_model(model)
    memory = memory_for(text)
    dtype = text.layers[memory.config.layers[0]].ple.ple_embedding.ngram_embedding.weight.dtype
    text.memory = memory
    try:
        source = serve_tables(text, folder, settings, dtype)
    except BaseException:
        del text.memory
        raise
    drop_tables(text, memory)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained = MethodType(_save_adapter, model)
    return source


def _save_adapter(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """transformers' `save_pretrained` of an adapter; a whole model would be saved without its tables."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "A model whose tables are served is not saved, since a copy would lack them: save an adapter of PEFT, or "
            "the state_dict of what was trained."
        )
    PreTrainedModel.save_pretrained(model, *args, **kwargs)


class ServedModel(PreTrainedModel):
    """What the classes below share (abstract): loading without the tables.

    They are called as transformers calls them, which looks names of classes up.
    """

    def __init__(self, config: Any, *args: Any, tables: TableFolder | None = None, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._keys_to_ignore_on_load_unexpected.add(r"\.ple\.ple_embedding\.")
        text = _text_model(self)
        memory = memory_for(text)
        drop_tables(text, memory)
        if tables is not None:
            require_tables_of(memory, tables)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Must be False: transformers would load the files of custom code without its renaming of weights."""
        return False

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, tables: str | Path, memory: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`, which leaves the n-gram tables where they are.

        Args:
            name, args, kwargs: as transformers takes them; the settings of `ServingSettings` besides.
            tables: what `engrammar table import` made of the model's files, or of those of the same model.
            memory: where their rows are read: "ram", "disk", or a function that opens the store of a table.

        Raises:
            ValueError: the tables are not this model's, or a setting is not allowed.
        """
        given = {key: kwargs.pop(key) for key in SERVING if key in kwargs}
        settings, opened = ServingSettings(where=memory, **given), open_tables(Path(tables))
        loaded = super().from_pretrained(name, *args, tables=opened, **kwargs)
        model: Self = loaded[0] if isinstance(loaded, tuple) else loaded
        serve_tables(model, opened.path, settings, model.dtype)
        return loaded

    save_pretrained = _save_adapter


@final
class Qwen4ExpForCausalLM(ServedModel, qwen4_exp.Qwen4ExpForCausalLM):
    """transformers' class of this name, with its tables served."""


@final
class Qwen4ExpForConditionalGeneration(ServedModel, qwen4_exp.Qwen4ExpForConditionalGeneration):
    """transformers' class of this name, with its tables served."""
