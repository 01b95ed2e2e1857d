"""Saves and loads a model as a transformers checkpoint in which each memory table has its own safetensors shard."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.hub import create_and_tag_model_card, hf_api

from engrammar.memory import Memory
from engrammar.model.configuration import load_config
from engrammar.stores.serving import ServingSettings, StoredTables, serve_tables
from engrammar.table import MemoryTable
from engrammar.tables.checksums import MANIFEST, check_files
from engrammar.tables.encodings import PLAIN
from engrammar.tables.folder import open_tables
from engrammar.tables.memory_json import finish_checkpoint
from engrammar.tables.shards import CODE, MEMORY, check_shards, is_table, model_files, remove_checkpoint, write_tables

SERVING = {field.name for field in fields(ServingSettings)} - {"where"}
SAVING = ("max_shard_size", "token", "save_peft_format", "save_original_format")  # other settings are the Hub's
DOWNLOAD = ("revision", "cache_dir", "token", "local_files_only", "force_download")

# What transformers raises if the settings or the weights are not those that were saved.
DAMAGE = (SafetensorError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)


class WithoutTables(dict[str, Tensor]):
    """A `state_dict` for `save_pretrained` without tables; the caller saves them, as the Trainer does."""


class SavedModel(PreTrainedModel):
    """A model that `save_pretrained` writes and `from_pretrained` reads, tables included (abstract)."""

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """transformers' `save_pretrained`, with each memory table in its own shard, and checksums of every file.

        Placed or served tables are written too, whether `state_dict` is given or not. With `push_to_hub` the upload is
        the last step, tables included.

        Raises:
            ValueError: a `variant` or a distributed checkpoint is asked for, which tables do not support; accelerate
                has offloaded weights; or the model's tables are served from this very folder.
        """
        if getattr(self, "_hf_peft_config_loaded", False):  # only the adapters are saved
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        for name in ("variant", "distributed_checkpoint"):
            if value := kwargs.pop(name, None):
                raise ValueError(f"{name} is {value!r}; checkpoints with memory tables have none: leave it out.")
        for module in self.modules():
            if isinstance(module, Memory):
                module.require_classes()
        folder, given = Path(save_directory), self.state_dict() if state_dict is None else state_dict
        if away := [name for name, tensor in given.items() if tensor.is_meta]:
            raise ValueError(
                f"{away[0]} and {len(away) - 1} other weights are offloaded: load the model whole to save it."
            )
        tables = {name: tensor for name, tensor in given.items() if is_table(name)}
        backbone = {name: tensor for name, tensor in given.items() if name not in tables}
        sources = {module.source for module in self.modules() if isinstance(module, MemoryTable) and module.source}
        for source in sources:
            source.check_save(folder)
        hub = {name: kwargs.pop(name) for name in [*kwargs] if name not in SAVING}
        upload = self._start_upload(folder, kwargs.get("token"), hub) if push_to_hub and is_main_process else None
        if is_main_process:
            remove_checkpoint(folder)
        super().save_pretrained(folder, is_main_process, state_dict=backbone, **kwargs)
        if tables and is_main_process:
            write_tables(folder, tables)
        if isinstance(state_dict, WithoutTables):
            return
        for source in sources:
            if is_main_process or not isinstance(source, StoredTables):  # each rank writes its part of placed tables
                source.save(folder)
        if is_main_process:
            finish_checkpoint(folder)
        if upload is not None:
            upload()

    def _start_upload(self, folder: Path, token: Any, hub: dict[str, Any]) -> Callable[[], None]:
        """Makes the repository, as transformers does; the function returned uploads what was written since."""
        message, create_pr = hub.pop("commit_message", None), hub.pop("create_pr", False)
        folder.mkdir(parents=True, exist_ok=True)
        name = hub.pop("repo_id", folder.name)
        repo_id = hf_api().create_repo(name, exist_ok=True, token=token, **hub).repo_id
        before = self._get_files_timestamps(folder)

        def upload() -> None:
            create_and_tag_model_card(repo_id, self.model_tags, token=token).save(folder / "README.md")
            self._upload_modified_files(
                folder, repo_id, before, commit_message=message, token=token, create_pr=create_pr
            )

        return upload

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, verify: bool = False, **kwargs: Any
    ) -> Any:
        """transformers' `from_pretrained`, which refuses damaged files, missing shards and missing weights.

        If the folder has a `manifest.json`, JSON files and headers are always compared with its checksums. Headers are
        left out if `output_loading_info` is given without `verify`: the caller may want other weights.

        Args:
            verify: whether all bytes of the weights and tables are compared as well.
            memory: where the memory's tables stay: "ram", "disk", or a function that opens the store of a table.
                Without it they are weights of the model. `cache_rows`, `on_missing`, `deadline` and `sharing` belong to
                it: see `ServingSettings`.

        Raises:
            ValueError: a file is missing, cut short or damaged; a setting is not one of those above; or the checkpoint
                lacks weights of this model. With `output_loading_info=True` missing weights are allowed: they are newly
                initialized, and the info names them.
        """
        serving, wants_info = take_serving(kwargs), kwargs.pop("output_loading_info", False)
        if serving is not None:
            kwargs["tables"] = "external"
        name, folder = pretrained_model_name_or_path, Path()
        if name is not None:
            root = local_folder(str(name), kwargs)
            folder, pretrained_model_name_or_path = Path(root, kwargs.get("subfolder") or ""), str(root)
            check_shards(folder)
            names = [file for file in model_files(folder) if verify or not wants_info or file.endswith(".json")]
            check_files(folder, names, whole=verify)
            _check_settings(folder, cls.config_class if kwargs.get("config") is None else None)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except DAMAGE as error:
            if isinstance(error, RuntimeError) and "mismatch" in str(error):
                wrong = "the weights have other shapes than its config.json says"
            elif isinstance(error, SafetensorError) or not (folder / MANIFEST).is_file():
                wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            else:  # the files are those that were saved
                raise
            raise ValueError(f"{folder} does not load ({wrong}): copy the checkpoint again.") from error
        _check_loaded(folder, info, external=serving is not None, complete=name is not None and not wants_info)
        if name is not None:
            model.name_or_path = model.config.name_or_path = str(name)
        for module in model.modules():
            if isinstance(module, MemoryTable):
                module.init_seed = None
        if serving is not None:
            serve_tables(model, folder, serving)
        return (model, info) if wants_info else model


def take_serving(kwargs: dict[str, Any]) -> ServingSettings | None:
    """Takes the settings of serving out of `kwargs` and checks them; None if there are none."""
    given = {key: kwargs.pop(key) for key in [*kwargs] if key in SERVING}
    if isinstance(kwargs.get("memory"), str) or callable(kwargs.get("memory")):
        return ServingSettings(where=kwargs.pop("memory"), **given)
    if given:
        raise ValueError(f"{next(iter(given))} needs memory='ram', 'disk' or a store: tables are weights otherwise.")
    return None


def local_folder(name: str, kwargs: dict[str, Any]) -> Path:
    """The folder called `name`, or the folder that the Hub's model of that name was downloaded to."""
    if Path(name).is_dir():
        return Path(name)
    inner = f"{kwargs['subfolder']}/" if kwargs.get("subfolder") else ""
    try:
        path = snapshot_download(
            name,
            allow_patterns=[f"{inner}*.json", f"{inner}*.safetensors", f"{inner}{CODE}"],
            ignore_patterns=[f"{inner}*/*", "*.optimizer.safetensors"],
            **{key: kwargs[key] for key in DOWNLOAD if kwargs.get(key) is not None},
        )
    except HFValidationError as error:
        raise ValueError(f"{name} is neither a folder nor the name of a model on the Hub: give one of them.") from error
    return Path(path)


def _check_settings(folder: Path, kind: Any) -> None:
    """Checks a checkpoint's settings of `generate`, and its config if its `kind` is given."""
    if kind is not None:
        load_config(folder, kind)
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:  # transformers raises many kinds for other JSON
            wrong = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} does not hold settings of `generate` ({wrong}): copy it again.") from error


def _check_loaded(folder: Path, info: dict[str, Any], *, external: bool, complete: bool) -> None:
    """Raises a ValueError if weights of a memory were left over or, with `complete`, if weights are missing."""
    left_over = sorted(
        key
        for key in info["unexpected_keys"]
        if ".fusion." in key or ("memory." in key and not (external and is_table(key)))
    )
    if left_over:
        raise ValueError(
            f"{folder} holds memory that its config.json does not name ({left_over[0]}, ...): it is of another "
            "model; copy the checkpoint again."
        )
    missing = sorted(info["missing_keys"])
    encoding = open_tables(folder).encoding if missing and (folder / MEMORY).exists() else "fp32"
    if encoding not in PLAIN and all(map(is_table, missing)):
        raise ValueError(f"The tables in {folder} are stored as {encoding}: load them with memory='ram' or 'disk'.")
    if missing and complete:
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of this model ({', '.join(missing[:3])}, ...): the checkpoint is "
            "incomplete; copy it again, or give output_loading_info=True."
        )
