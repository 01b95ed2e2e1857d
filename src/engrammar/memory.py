"""The one door to a model's rows: token ids -> the rows of every memory layer, before the first block runs.

Knows nothing of hidden states; fusion knows nothing of ids. What passes between them is `Retrieved`.
Letters: B batch, T tokens, S = N-1 positions of history, V ids, H columns, E width of a token's rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from engrammar.addressing import hash_ngrams, look_back
from engrammar.config import Geometry, MemoryConfig
from engrammar.table import MemoryTable, Rows, RowSource, Tables


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """What retrieval hands to fusion: made by `Memory.retrieve`, passed to a model's `forward(..., retrieved=...)`.

    Attributes:
        input_ids: the ids it was made for; a forward pass of others refuses it.
        waits: per memory layer index in the model, a function that waits for its rows.
        dead_BT: True where the memory adds nothing: masked positions (padding), dead ids; None where there are none.
        starts_BT: True where a packed document begins; None where rows are not packed.
        own_history: whether each token was given a history of its own (flat tokens of many sequences), so that its
            neighbor in the batch is not the token before it.
    """

    input_ids: Tensor
    waits: Mapping[int, Callable[[], Rows]] = field(default_factory=dict)
    dead_BT: Tensor | None = None
    starts_BT: Tensor | None = None
    own_history: bool = False

    def wait(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """A layer's rows, once they are there: embedding_BTE, and dead_BT with the positions that lack a row.

        None for a layer without memory.
        """
        if layer not in self.waits:
            return None, None
        embedding_BTE, missing_BT = self.waits[layer]()
        if missing_BT is None or self.dead_BT is None:
            return embedding_BTE, self.dead_BT if missing_BT is None else missing_BT
        return embedding_BTE, self.dead_BT | missing_BT

    def check_made_for(self, input_ids: Tensor) -> None:
        """Raises a ValueError if these are other ids than the rows were read for (their values on the CPU only)."""
        same = self.input_ids.shape == input_ids.shape
        if same and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            same = torch.equal(self.input_ids.cpu(), input_ids)
        if not same:
            raise ValueError("`retrieved` was made for other input_ids: call retrieve with the ids of this pass.")


class Memory(nn.Module):
    """The tables of all memory layers, and the class map that addresses them.

    `class_of_id` is saved with the model, so a checkpoint addresses its rows without its tokenizer. It holds -1 until
    `set_classes` or loading fills it; with `compression="none"` there is none, unless ids came later
    (`resize_vocabulary`).
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
        # Whether the class map was found filled: looking costs a synchronization.
        self._classes_seen = config.compression == "none"

    def table(self, layer: int) -> MemoryTable:
        """The table of a layer of the model."""
        table = self.tables[str(layer)]
        assert isinstance(table, MemoryTable)
        return table

    @property
    def source(self) -> RowSource | None:
        """Where the rows are, if they are not the tables' own parameters."""
        return self.table(self.config.layers[0]).source

    @torch.no_grad()
    def set_classes(self, classes_V: Tensor) -> None:
        """Fills the class map (`vocabulary.compress_vocabulary`), checking that it belongs to this geometry.

        Ids that the tokenizer lacks but the vocabulary is padded with take the class of missing history.
        """
        if self.class_of_id is None or self.config.compression == "none":
            raise ValueError("memory.compression is 'none': this model has no class map to set.")
        num_classes, fill_id, fill_class = int(classes_V.max()) + 1, self.config.fill_id, self.geometry.fill_class
        whole = classes_V.shape == (self.num_ids,) and not classes_V.is_floating_point() and int(classes_V.min()) >= 0
        if not whole or num_classes != self.geometry.num_classes or int(classes_V[fill_id]) != fill_class:
            raise ValueError(
                f"The class map has {classes_V.shape[0]} ids in {num_classes} classes, but this model was built for "
                f"{self.num_ids} ids in {self.geometry.num_classes} classes: use the tokenizer "
                "it was built with."
            )
        self.class_of_id.fill_(fill_class)[: self.num_ids] = classes_V

    def first_classes(self, vocab_size: int) -> Tensor | None:
        """The class map before `set_classes`: -1; or raw ids, those that the hash was not made for as missing history.

        None where raw ids need no map.
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
        """Cuts the class map to `vocab_size` ids, or gives new ids the class of missing history."""
        self.num_ids = min(self.num_ids, vocab_size)
        kept_V, resized_V = self.class_of_id, self.first_classes(vocab_size)
        if resized_V is not None and kept_V is not None:
            resized_V.fill_(self.geometry.fill_class)[: len(kept_V)] = kept_V[:vocab_size]
        self.class_of_id = None if resized_V is None else resized_V.to(device)

    def require_classes(self) -> None:
        """Raises a ValueError if the class map was never filled, on any device: every n-gram would read the same rows.

        Under torch.compile it cannot look; run one pass, or call this, before compiling.
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
            attention_mask: [B, T], zero where these positions are padding.
            position_ids: [B or 1, T]. Without a mask and a history, positions that restart at 0 tell packed documents.
            history: the N-1 ids before each row, [B, N-1], -1 where there are none; or before each token, [B, T, N-1],
                for flat tokens in the middle of many sequences. None: the rows begin here.

        Raises:
            ValueError: the class map was never set, a mask or history of another shape, or positions that say that the
                rows go on from earlier tokens when no history is given.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self.retrieve_step([{**batch, "history": history}])[0]

    def retrieve_step(self, passes: Sequence[Mapping[str, Tensor | None]]) -> list[Retrieved]:
        """As `retrieve`, for several forward passes at once: a source outside the model reads each distinct row once.

        Args:
            passes: for each, the arguments of `retrieve` by name.
        """
        self.require_classes()
        looked_up = [self._look_up(**one) for one in passes]  # type: ignore[arg-type]
        waits = self._read([rows for _, rows in looked_up])
        return [replace(retrieved, waits=own) for (retrieved, _), own in zip(looked_up, waits)]

    def _read(self, passes: list[dict[int, Tensor]]) -> list[dict[int, Callable[[], Rows]]]:
        """Starts every table's reads; a source outside the model gets those of all tables and passes at once."""
        tables = {layer: self.table(layer) for layer in self.config.layers}
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
        """Per memory layer the rows [B, T, H] of its table that `retrieve` would read; arguments and errors alike."""
        self.require_classes()
        return self._look_up(input_ids, attention_mask, position_ids, history)[1]

    def _look_up(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        history: Tensor | None = None,
    ) -> tuple[Retrieved, dict[int, Tensor]]:
        """What is known of a pass before its rows are there, and per memory layer their numbers rows_BTH."""
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
    """Ids with -1 where masked, the mask, and where packed documents start.

    As in transformers' attention mask, position ids that restart tell packed documents, where there is neither a mask
    nor a history (`continued`).

    Raises:
        ValueError: a mask that is not [B, T], or positions that do not begin at 0 although nothing comes before.
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
