"""Saves and loads a model as a transformers checkpoint with each memory table in a safetensors shard of its own."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from engrammar.memory import Memory
from engrammar.stores.serving import serve_tables
from engrammar.table import MemoryTable
from engrammar.tables.encodings import PLAIN
from engrammar.tables.folder import open_tables
from engrammar.tables.memory_json import finish_checkpoint
from engrammar.tables.shards import MEMORY, check_shards, is_table, remove_checkpoint, write_tables

SERVING = ("cache_rows", "on_missing", "deadline")  # settings of `serve_tables`


class SavedModel(PreTrainedModel):
    """A model that `save_pretrained` writes and `from_pretrained` reads, tables included. Abstract."""

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """transformers' `save_pretrained`, with each memory table in a safetensors shard of its own."""
        if kwargs.get("variant") is not None:
            raise ValueError(f"variant is {kwargs['variant']!r}; checkpoints with memory tables have no variants.")
        for module in self.modules():
            if isinstance(module, Memory):
                module.require_classes()
        given = kwargs.pop("state_dict", None)
        state_dict = self.state_dict() if given is None else given
        tables = {name: tensor for name, tensor in state_dict.items() if is_table(name)}
        backbone = {name: tensor for name, tensor in state_dict.items() if name not in tables}
        sources = {module.source for module in self.modules() if isinstance(module, MemoryTable) and module.source}
        for source in sources:
            source.check_save(Path(save_directory))
        if is_main_process:
            remove_checkpoint(Path(save_directory))
        super().save_pretrained(save_directory, is_main_process, state_dict=backbone, **kwargs)
        if tables and is_main_process:
            write_tables(Path(save_directory), tables)
            finish_checkpoint(Path(save_directory))
        for source in sources if given is None else ():
            source.save(Path(save_directory))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`, which refuses a missing or truncated shard and a missing weight.

        Args:
            memory: where the memory's tables stay: "ram" or "disk", or a function that opens the store of a table.
                Without it they are weights of the model. `cache_rows`, `on_missing` and `deadline` go with
                it: see `stores.serving.serve_tables`.

        Raises:
            ValueError: a shard is missing or cut short, or the checkpoint lacks weights of this model and the caller
                does not ask for their names (`output_loading_info=True`; they are new weights then).
        """
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder", ""))
        if pretrained_model_name_or_path is not None and folder.is_dir():
            check_shards(folder)
        serving = {key: kwargs.pop(key) for key in SERVING if key in kwargs}
        if isinstance(kwargs.get("memory"), str) or callable(kwargs.get("memory")):
            serving["where"] = kwargs.pop("memory")
            kwargs["tables"] = "external"
        elif serving:
            raise ValueError(
                f"{next(iter(serving))} needs memory='ram', 'disk' or a store: tables are weights otherwise."
            )
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise ValueError(
                f"The weights in {folder} have other shapes than its config.json says: copy the checkpoint again."
            ) from error
        external = kwargs.get("tables") == "external"
        left_over = sorted(
            key
            for key in info["unexpected_keys"]
            if ".fusion." in key or "rival." in key or ("memory." in key and not (external and is_table(key)))
        )
        if left_over:
            raise ValueError(
                f"{folder} holds memory that its config.json does not name ({left_over[0]}, ...): it is of another "
                "model; copy the checkpoint again."
            )
        encoding = open_tables(folder).encoding if info["missing_keys"] and (folder / MEMORY).exists() else "fp32"
        if encoding not in PLAIN and all(map(is_table, info["missing_keys"])):
            raise ValueError(f"The tables in {folder} are stored as {encoding}: load them with memory='ram' or 'disk'.")
        if info["missing_keys"] and pretrained_model_name_or_path is not None and not wants_info:
            names = ", ".join(sorted(info["missing_keys"])[:3])
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(info['missing_keys'])} weights of this model "
                f"({names}, ...): the checkpoint is incomplete; copy it again, or give output_loading_info=True."
            )
        for module in model.modules():
            if isinstance(module, MemoryTable):
                module.init_seed = None
        if serving:
            serve_tables(model, folder, **serving)
        return (model, info) if wants_info else model
