"""The one door to a model's rows: token ids -> the rows of every memory layer, before the first block runs.

This module knows nothing of hidden states, and fusion knows nothing of ids. Only `Retrieved` passes between them.
Letters: B batch, T tokens, S = N-1 positions of history, V ids, H columns, E width of a token's rows.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engrammar.addressing import hash_ngrams, look_back
from engrammar.config import Geometry, MemoryConfig
from engrammar.table import MemoryTable, Rows, RowSource, Tables


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """What retrieval hands to fusion. `Memory.retrieve` makes it; a model's `forward(..., retrieved=...)` takes it.

    Attributes:
        input_ids: the ids whose rows these are; a forward pass of other ids refuses it.
        waits: for each memory layer, by its index in the model, a function that waits for its rows.
        dead_BT: True where the memory adds nothing, at masked positions (padding) and dead ids. None: nowhere.
        starts_BT: True where a packed document begins. None: the rows are not packed.
        own_history: whether each token was given its own history (flat tokens of many sequences). The token before it
            in the batch is then not the token before it in the text.
        windows: for each memory layer with a convolution, `Fusion.forward`'s `extend`. Whoever gives tokens their own
            history gives them their own windows; otherwise they are in the cache, and this is empty.
        cache: the cache that the model's `retrieve` was given, whose tokens come before these; None: none.
    """

    input_ids: Tensor
    waits: Mapping[int, Callable[[], Rows]] = field(default_factory=dict)
    dead_BT: Tensor | None = None
    starts_BT: Tensor | None = None
    own_history: bool = False
    windows: Mapping[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    cache: Any = None

    def of_layer(self, layer: int) -> tuple[Any, ...]:
        """Waits for a layer's rows; returns the arguments of `Fusion.forward` after the hidden state."""
        return *self.wait(layer), self.starts_BT, self.windows.get(layer)

    def wait(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Waits for a layer's rows and returns embedding_BTE, and dead_BT, which includes positions that lack a row.

        Both are None for a layer without memory.
        """
        if layer not in self.waits:
            return None, None
        embedding_BTE, missing_BT = self.waits[layer]()
        if missing_BT is None or self.dead_BT is None:
            return embedding_BTE, self.dead_BT if missing_BT is None else missing_BT
        return embedding_BTE, self.dead_BT | missing_BT

    def check_made_for(self, input_ids: Tensor) -> None:
        """Raises a ValueError if the rows were read for other ids (values are compared on the CPU only)."""
        same = self.input_ids.shape == input_ids.shape
        if same and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            same = torch.equal(self.input_ids.cpu(), input_ids)
        if not same:
            raise ValueError("`retrieved` was made for other input_ids: call retrieve with the ids of this pass.")


class Memory(nn.Module):
    """The tables of all memory layers, and the class map that addresses them.

    `class_of_id` is saved with the model, so a checkpoint addresses its rows without its tokenizer. It holds -1 until
    `set_classes` or loading fills it. With `compression="none"` there is no map, unless `resize_vocabulary` has added
    ids.
    """

    class_of_id: Tensor | None

    def __init__(
        self,
        config: MemoryConfig,
        geometry: Geometry,
        *,
        num_ids: int,
        vocab_size: int,
        tables: Tables = "parameters",
    ) -> None:
        super().__init__()
        self.config = config
        self.geometry = geometry
        self.num_ids = num_ids
        self.tables = nn.ModuleDict(
            {str(layer): MemoryTable(config, geometry, index, tables) for index, layer in enumerate(config.layers)}
        )
        self.register_buffer("class_of_id", self.first_classes(vocab_size))
        # Remembers that the class map is filled, since looking costs a synchronization.
        self._classes_seen = config.compression == "none"

    def table(self, layer: int) -> MemoryTable:
        """The table of the model's block `layer`."""
        table = self.tables[str(layer)]
        assert isinstance(table, MemoryTable)
        return table

    @property
    def layers(self) -> list[int]:
        """The layers whose tables are here: all, but for a stage of a pipeline."""
        return [layer for layer in self.config.layers if str(layer) in self.tables]

    def keep(self, layers: Collection[int]) -> None:
        """Drops the tables of all other layers."""
        for layer in self.layers:
            if layer not in layers:
                del self.tables[str(layer)]

    @property
    def source(self) -> RowSource | None:
        """The source of the rows; None if they are the tables' own parameters."""
        return self.table(self.layers[0]).source

    @torch.no_grad()
    def set_classes(self, classes_V: Tensor) -> None:
        """Fills the class map with the classes that `vocabulary.compress_vocabulary` returned.

        Padding ids of the vocabulary, which the tokenizer lacks, take the class of missing history.

        Raises:
            ValueError: the classes do not belong to this geometry, or the memory has no class map.
        """
        if self.class_of_id is None or self.config.compression == "none":
            raise ValueError("memory.compression is 'none': this model has no class map to set.")
        num_classes, fill_class = int(classes_V.max()) + 1, self.geometry.fill_class
        whole = classes_V.shape == (self.num_ids,) and not classes_V.is_floating_point() and int(classes_V.min()) >= 0
        whole = whole and self.config.fill_id < self.num_ids and int(classes_V[self.config.fill_id]) == fill_class
        if not whole or num_classes != self.geometry.num_classes:
            raise ValueError(
                f"The class map has {classes_V.shape[0]} ids in {num_classes} classes, but this model was built for "
                f"{self.num_ids} ids in {self.geometry.num_classes} classes: use the tokenizer "
                "it was built with."
            )
        self.class_of_id.fill_(fill_class)[: self.num_ids] = classes_V

    def first_classes(self, vocab_size: int) -> Tensor | None:
        """The class map before `set_classes`: -1 everywhere, or without compression the raw ids.

        Raw ids that the hash was not made for take the class of missing history. None: raw ids need no map.
        """
        num_classes = self.geometry.num_classes
        if self.config.compression == "normalized":
            return torch.full((vocab_size,), -1)
        if vocab_size <= num_classes:
            return None
        ids_V = torch.arange(vocab_size)
        return ids_V.where(ids_V < num_classes, self.geometry.fill_class)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises a ValueError if a vocabulary of this size lacks an id that the settings name."""
        named = max(self.config.fill_id, *self.config.dead_ids, *self.config.end_ids, 0)
        if vocab_size <= named:
            raise ValueError(
                f"The vocabulary cannot shrink to {vocab_size} ids: memory.fill_id, dead_ids or end_ids names id "
                f"{named}; keep {named + 1} or more."
            )

    def resize_vocabulary(self, vocab_size: int, device: torch.device) -> None:
        """Cuts the class map to `vocab_size` ids, or extends it: new ids take the class of missing history."""
        self.num_ids = min(self.num_ids, vocab_size)
        kept_V, resized_V = self.class_of_id, self.first_classes(vocab_size)
        if resized_V is not None and kept_V is not None:
            resized_V.fill_(self.geometry.fill_class)[: len(kept_V)] = kept_V[:vocab_size]
        self.class_of_id = None if resized_V is None else resized_V.to(device)

    def require_classes(self) -> None:
        """Raises a ValueError if the class map was never filled: every n-gram would then read the same rows.

        It works on any device, but cannot look under torch.compile: call it, or run one pass, before compiling.
        """
        if self._classes_seen or self.class_of_id is None or self.class_of_id.is_meta:
            return
        if torch.compiler.is_compiling() or bool((self.class_of_id < 0).any()):
            raise ValueError(
                "The model's class map was never set: load a checkpoint, or call memory.set_classes. (Before "
                "torch.compile, call memory.require_classes.)"
            )
        self._classes_seen = True

    def retrieve(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        history: Tensor | None = None,
    ) -> Retrieved:
        """Starts reading the rows of every memory layer for these tokens.

        Args:
            input_ids: [B, T], raw token ids; negative ones are masked.
            attention_mask: [B, T], zero at padding.
            position_ids: [B or 1, T]. If there is neither a mask nor a history, positions that restart at 0 mark packed
                documents.
            history: the N-1 ids before each row, [B, N-1], -1 where there are none; or those before each token,
                [B, T, N-1], for flat tokens in the middle of many sequences. None: the rows begin here.

        Raises:
            ValueError: the class map was never set; the mask or the history has another shape; or positions continue
                earlier tokens, but no history is given.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self.retrieve_step([{**batch, "history": history}])[0]

    def retrieve_step(self, passes: Sequence[Mapping[str, Tensor | None]]) -> list[Retrieved]:
        """As `retrieve`, for several forward passes at once. A source outside the model reads each distinct row once.

        Args:
            passes: for each pass, the arguments of `retrieve` by name.
        """
        looked_up = [self.look_up(**one) for one in passes]  # type: ignore[arg-type]
        waits = self._read([rows for _, rows in looked_up])
        return [replace(retrieved, waits=own) for (retrieved, _), own in zip(looked_up, waits)]

    def _read(self, passes: list[dict[int, Tensor]]) -> list[dict[int, Callable[[], Rows]]]:
        """Starts the reads of every table. A source outside the model gets those of all tables and passes at once."""
        tables = {layer: self.table(layer) for layer in self.layers}
        if self.source is None:
            return [{layer: partial(Rows, tables[layer](rows)) for layer, rows in one.items()} for one in passes]
        reads = self.source.read([{tables[layer].name: rows for layer, rows in one.items()} for one in passes])
        return [{layer: read[table.name] for layer, table in tables.items()} for read in reads]

    def addresses(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        history: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """For each memory layer, the rows_BTH that `retrieve` would read. Arguments and errors are the same."""
        return self.look_up(input_ids, attention_mask, position_ids, history)[1]

    def look_up(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        history: Tensor | None = None,
    ) -> tuple[Retrieved, dict[int, Tensor]]:
        """Returns what is known of a pass before its rows arrive, and for each memory layer the numbers rows_BTH."""
        self.require_classes()
        ids_BT, mask_BT, starts_BT = masked_ids(input_ids, attention_mask, position_ids, continued=history is not None)
        own_history = history is not None and history.ndim == 3
        ids, past = ids_BT, history
        if own_history:  # each token is a row of its own
            assert history is not None
            if history.shape[:2] != ids_BT.shape:
                raise ValueError(
                    f"history is {list(history.shape)}; allowed: {[*ids_BT.shape, 'N-1']}, the ids before each token."
                )
            ids, past = ids_BT.reshape(-1, 1), history.reshape(-1, history.shape[-1])
        chosen = {"config": self.config, "geometry": self.geometry}
        looked_back = look_back(ids, history_BS=past, classes_V=self.class_of_id, starts_BT=starts_BT, **chosen)  # type: ignore[arg-type]
        rows = {
            layer: hash_ngrams(looked_back, layer_index=index, **chosen).view(*ids_BT.shape, -1)  # type: ignore[arg-type]
            for index, layer in enumerate(self.config.layers)
            if layer in self.layers
        }
        dead_BT = None if mask_BT is None else ~mask_BT
        if self.config.dead_ids and self.config.dead_positions == "silent":
            silent_BT = torch.isin(ids_BT, torch.tensor(self.config.dead_ids, device=ids_BT.device))
            dead_BT = silent_BT if dead_BT is None else dead_BT | silent_BT
        retrieved = Retrieved(input_ids=input_ids, dead_BT=dead_BT, starts_BT=starts_BT, own_history=own_history)
        return retrieved, rows


def masked_ids(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, *, continued: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the ids with -1 where they are masked, the mask, and where packed documents start.

    As in transformers' attention mask, position ids that restart mark packed documents if there is neither a mask nor a
    history (`continued`).

    Raises:
        ValueError: the mask is not [B, T], or positions do not begin at 0 although there are no earlier tokens.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}; looking up ids needs one of {list(input_ids.shape)}."
        )
    mask_BT = None if attention_mask is None else attention_mask.bool()
    masked = input_ids if mask_BT is None else input_ids.masked_fill(~mask_BT, -1)
    if position_ids is None or continued:
        return masked, mask_BT, None
    starts_BT = nn.functional.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0), value=True)
    starts_BT = starts_BT.expand(input_ids.shape[0], -1)
    begins_BT = starts_BT
    if mask_BT is not None:  # which positions a padded row has is the caller's choice, but an unpadded one starts at 0
        begins_BT = nn.functional.pad(mask_BT[:, :1], (0, input_ids.shape[1] - 1), value=False)
    if not torch.compiler.is_compiling() and bool((begins_BT & (position_ids != 0)).any()):
        raise ValueError(
            "position_ids begin after 0, so tokens come before these ones, but no history was given: pass the cache "
            "that holds them, or `retrieved` made with their ids as history."
        )
    return masked, mask_BT, starts_BT if mask_BT is None else None


def memory_of(model: nn.Module) -> Memory | None:
    """The memory of a model, or None."""
    memories = [module for module in model.modules() if isinstance(module, Memory)]
    assert len(memories) <= 1, "a model has one memory"
    return memories[0] if memories else None
