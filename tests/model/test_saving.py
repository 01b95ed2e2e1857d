"""A saved model is whole: every file of it is checked, and it is uploaded, copied and found with its tables."""

import json
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from engrammar.model import saving
from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.tables.checksums import MANIFEST
from engrammar.tables.shards import HOT_ROWS, MEMORY
from engrammar.tables.verify import verify_folder
from models import tiny_config, tiny_model

IDS = torch.arange(3, 29).view(2, 13)
TABLES = {f"memory.tables.{layer}.safetensors" for layer in (1, 3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model("paper").save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(folder, **settings):
    return EngrammarForCausalLM.from_pretrained(folder, **settings)(IDS).logits


def sentence(error):
    text = str(error)
    assert type(error) is ValueError and "\n" not in text and 20 < len(text) < 900, repr(error)
    return text


def mutate(content, rng):
    """Other bytes than `content`: some changed, cut, moved or inserted, or a value of JSON replaced."""
    kind, place = rng.randrange(7), rng.randrange(len(content))
    changed = bytearray(content)
    if kind == 6 and content.startswith(b"{"):
        tree = json.loads(content)
        parent = tree
        while isinstance(parent[key := rng.choice([*parent])], dict) and parent[key] and rng.random() < 0.8:
            parent = parent[key]
        parent[key] = rng.choice([None, -1, 0, 7, 2**70, 0.5, "x", [], [1], {}, {"a": 1}, True])
        changed = bytearray(json.dumps(tree).encode())
    elif kind in (0, 1, 6):
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        changed[place] = rng.randrange(256)
    elif kind == 3:
        del changed[place:]
    elif kind == 4:
        del changed[place : place + rng.choice([1, 8, 64])]
    else:
        changed[place:place] = rng.choice([b"0", b"}", b'"', b"\xff", b"[" * 50, bytes(8)])
    return bytes(changed)


def check_mutations(saved, tmp_path, each, settings):
    """Loads a folder whose files were changed, one at a time; how often it was refused, and how often not."""
    folder = shutil.copytree(saved, tmp_path / "model")
    rng, expected, counts = random.Random(repr(settings)), logits_of(saved), [0, 0]
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for _ in range(each):
            changed = mutate(content, rng)
            path.write_bytes(changed)
            try:
                found = logits_of(folder, **settings)
            except ValueError as error:
                counts[0] += 1
                assert str(folder) in sentence(error)
            else:
                counts[1] += 1
                assert torch.equal(found, expected), (path.name, changed[:99])
        path.write_bytes(content)
    return counts


MODES = [{"verify": True}, {}, {"verify": True, "memory": "disk"}]


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_a_changed_file_is_refused_or_changes_no_logit(saved, tmp_path, settings):
    refused, _ = check_mutations(saved, tmp_path, 8, settings)
    assert refused > 60


@pytest.mark.slow
@pytest.mark.parametrize("settings", MODES, ids=str)
def test_hundreds_of_changed_files_are_refused_or_change_no_logit(saved, tmp_path, settings):
    refused, _ = check_mutations(saved, tmp_path, 60, settings)
    assert refused > 500


def check_old_folder(saved, tmp_path, each):
    """Without a manifest damage may load, but every error is one sentence."""
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / MANIFEST).unlink()
    assert torch.equal(logits_of(folder), logits_of(saved))
    rng, refused = random.Random(0), 0
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for _ in range(each):
            path.write_bytes(mutate(content, rng))
            try:
                EngrammarForCausalLM.from_pretrained(folder, memory=rng.choice(["ram", None]))
            except ValueError as error:
                sentence(error)
                refused += 1
        path.write_bytes(content)
    return refused


def test_errors_of_a_damaged_folder_without_manifest_are_one_sentence(saved, tmp_path):
    assert check_old_folder(saved, tmp_path, 6) > 10


@pytest.mark.slow
def test_errors_of_hundreds_of_damaged_folders_without_manifest_are_one_sentence(saved, tmp_path):
    assert check_old_folder(saved, tmp_path, 40) > 80


def test_every_file_is_listed_and_verified(saved, tmp_path):
    names = {path.name for path in saved.iterdir()}
    assert json.loads((saved / MANIFEST).read_text())["files"].keys() == names - {MANIFEST}
    assert verify_folder(saved).num_bytes == sum((saved / name).stat().st_size for name in names - {MANIFEST})
    rng = random.Random(0)
    for name in sorted(names):
        folder = shutil.copytree(saved, tmp_path / name)
        content = bytearray((folder / name).read_bytes())
        content[rng.randrange(len(content))] ^= 64
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError) as caught:
            verify_folder(folder)
        assert name in sentence(caught.value)


def test_a_folder_without_manifest_loads_but_is_not_called_verified(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "old")
    (folder / MANIFEST).unlink()
    assert torch.equal(logits_of(folder), logits_of(saved))
    with pytest.raises(ValueError, match="no manifest.json, so its files cannot be verified: load it without"):
        logits_of(folder, verify=True)
    assert verify_folder(folder).without_sums == (
        "backbone.safetensors",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "modeling_engrammar.py",
    )
    with pytest.raises(ValueError, match="neither manifest.json nor memory.json"):
        verify_folder(tmp_path)


def test_a_file_that_was_added_is_no_damage(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "more")
    (folder / "README.md").write_text("A model.")
    logits_of(folder, verify=True)
    assert verify_folder(folder).without_sums == ("README.md",)
    (folder / "generation_config.json").unlink()  # of no use to the weights
    logits_of(folder, verify=True)


@pytest.mark.parametrize("auto", [True, False])
def test_a_config_that_was_edited_says_what_to_do(saved, tmp_path, auto):
    folder = shutil.copytree(saved, tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    kind = AutoModelForCausalLM if auto else EngrammarForCausalLM
    with pytest.raises(ValueError, match=r"config.json has .* delete manifest.json there"):
        kind.from_pretrained(folder)
    (folder / MANIFEST).unlink()
    assert kind.from_pretrained(folder).config.rms_norm_eps == 0.5


@pytest.mark.parametrize("change", [{"num_branches": "x"}, {"memory": [1]}, {"hidden_size": None}, {"geometry": {}}])
def test_other_settings_are_one_sentence(saved, tmp_path, change):
    folder = shutil.copytree(saved, tmp_path / "other")
    (folder / MANIFEST).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    for kind in (AutoModelForCausalLM, EngrammarForCausalLM):
        with pytest.raises(ValueError) as caught:
            kind.from_pretrained(folder)
        sentence(caught.value)


class Hub:
    """What was asked of the Hub, and the files of each upload as they were at that moment."""

    def __init__(self, monkeypatch):
        self.repositories, self.uploads = [], []
        card = SimpleNamespace(save=lambda path: path.write_text("card"))
        monkeypatch.setattr(saving, "hf_api", lambda: self)
        monkeypatch.setattr(saving, "create_and_tag_model_card", lambda *_, **__: card)
        monkeypatch.setattr(EngrammarForCausalLM, "_upload_modified_files", self.upload)

    def create_repo(self, repo_id, **settings):
        self.repositories.append((repo_id, settings))
        return SimpleNamespace(repo_id=f"org/{repo_id}")

    def upload(self, folder, repo_id, before, **settings):
        self.uploads.append(({path.name for path in folder.iterdir()} - before.keys(), repo_id, settings))


def test_tables_index_and_manifest_are_there_before_the_upload(tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    model, folder = tiny_model("paper"), tmp_path / "mine"
    model.save_pretrained(folder, push_to_hub=True, token="t", private=True, commit_message="first")
    assert hub.repositories == [("mine", {"exist_ok": True, "token": "t", "private": True})]
    ((files, repo_id, settings),) = hub.uploads
    assert files >= {MANIFEST, MEMORY, "backbone.safetensors", "config.json", "README.md", *TABLES}
    assert "model.safetensors" not in files and repo_id == "org/mine"
    assert settings == {"commit_message": "first", "token": "t", "create_pr": False}
    served = EngrammarForCausalLM.from_pretrained(folder, memory="disk")
    served.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="other")
    assert hub.uploads[1][0] >= {MANIFEST, MEMORY, *TABLES} and hub.uploads[1][1] == "org/other"
    model.save_pretrained(tmp_path / "rank 1", is_main_process=False, push_to_hub=True)
    assert len(hub.uploads) == 2


@pytest.mark.parametrize(
    "settings", [{}, {"memory": "disk"}, {"memory": "ram", "cache_rows": 50, "verify": True}], ids=str
)
def test_a_name_on_the_hub_is_downloaded_with_its_tables(saved, monkeypatch, tmp_path, settings):
    asked = []

    def download(name, **given):
        asked.append((name, given))
        return str(tmp_path)

    shutil.copytree(saved, tmp_path / "inner")
    monkeypatch.setattr(saving, "snapshot_download", download)
    where = {"revision": "v2", "cache_dir": "c", "token": "t", "subfolder": "inner"}
    model = EngrammarForCausalLM.from_pretrained("org/model", **where, **settings)
    assert torch.equal(model(IDS).logits, logits_of(saved)) and model.name_or_path == "org/model"
    ((name, given),) = asked
    assert name == "org/model" and {key: given[key] for key in ("revision", "cache_dir", "token")} == {
        key: where[key] for key in ("revision", "cache_dir", "token")
    }
    assert given["allow_patterns"] == ["inner/*.json", "inner/*.safetensors", "inner/modeling_engrammar.py"]


def test_what_is_no_folder_and_no_name_is_said(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor the name of a model on the Hub"):
        EngrammarForCausalLM.from_pretrained(tmp_path / "no" / "where")


def test_serving_settings_are_checked_before_anything_is_loaded(saved, monkeypatch):
    monkeypatch.setattr(saving, "check_shards", None)  # what would be called first
    for settings, wrong in (
        ({"memory": "dsk"}, "memory is 'dsk'; allowed: ram, disk"),
        ({"memory": "disk", "on_missing": "skip"}, "needs a deadline"),
        ({"memory": "disk", "on_missing": "no"}, "on_missing is 'no'"),
        ({"memory": "ram", "cache_rows": -1}, "cache_rows is -1"),
        ({"cache_rows": 5}, "cache_rows needs memory="),
    ):
        with pytest.raises(ValueError, match=wrong):
            EngrammarForCausalLM.from_pretrained(saved, **settings)


def test_a_state_dict_of_a_served_model_loses_no_table(saved, tmp_path):
    served = EngrammarForCausalLM.from_pretrained(saved, memory="disk")
    served.save_pretrained(tmp_path / "copy", state_dict=served.state_dict())
    assert torch.equal(logits_of(tmp_path / "copy", verify=True), logits_of(saved))
    served.save_pretrained(tmp_path / "rank 1", is_main_process=False)
    assert not list((tmp_path / "rank 1").glob("*"))


def test_what_does_not_go_with_tables_is_refused(tmp_path):
    for name in ("variant", "distributed_checkpoint"):
        with pytest.raises(ValueError, match=f"{name} is 'x'; checkpoints with memory tables have none"):
            tiny_model("paper").save_pretrained(tmp_path, **{name: "x"})


def test_a_saved_geometry_is_believed_and_never_derived_again(monkeypatch):
    config = tiny_config("paper")

    def derived(*_, **__):
        raise AssertionError("derived again")

    monkeypatch.setattr("engrammar.addressing.table_sizes", derived)
    monkeypatch.setattr("engrammar.model.configuration.derive_geometry", derived)
    again = tiny_config("paper", geometry=config.geometry)
    assert again.memory_geometry == config.memory_geometry
    config.geometry["multipliers"][0][0] += 1
    with pytest.raises(ValueError, match="does not fit the memory settings .a multiplier is even"):
        tiny_config("paper", geometry=config.geometry)


def test_rows_to_pin_may_be_added_to_a_saved_model(saved, tmp_path):
    from safetensors.torch import save_file

    folder = shutil.copytree(saved, tmp_path / "hot")
    save_file({"1": torch.arange(5), "3": torch.arange(7)}, folder / HOT_ROWS)
    assert torch.equal(logits_of(folder, memory="disk", cache_rows=20, verify=True), logits_of(saved))


def test_the_trainer_lists_every_file_of_its_final_save(tmp_path):
    from transformers import TrainingArguments

    from engrammar.train.trainer import EngrammarTrainer

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    (tmp_path / "log.jsonl").write_text("{}")
    trainer = EngrammarTrainer(tiny_model("paper"), args)
    trainer.place()
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    listed = json.loads((tmp_path / MANIFEST).read_text())["files"].keys()
    assert listed == names - {MANIFEST, "log.jsonl"} and {"training_args.bin", *TABLES} <= listed
    assert verify_folder(tmp_path).without_sums == ("log.jsonl",)
    logits_of(tmp_path, verify=True)


@pytest.mark.slow
def test_a_program_that_imported_nothing_loads_a_checkpoint_and_saves_it_again(saved, tmp_path):
    """By transformers' own way, which asks first; the code that it runs is one line that imports us."""
    script = f"""
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, again = {str(saved)!r}, {str(tmp_path / "again")!r}
try:
    AutoConfig.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
assert "engrammar" not in sys.modules
for name in (folder, again):
    model = AutoModelForCausalLM.from_pretrained(name, memory="disk", trust_remote_code=True)
    print(type(model).__module__, model(torch.arange(3, 29).view(2, 13)).logits.double().sum().item())
    if name == folder:
        model.save_pretrained(again)
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    expected = logits_of(saved).double().sum().item()
    assert done.stdout.split() == ["engrammar.model.modeling", str(expected)] * 2
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == ["modeling_engrammar.py"]
    assert (tmp_path / "again" / "config.json").read_bytes() == (saved / "config.json").read_bytes()


def test_offloaded_weights_compute_the_same_and_are_not_saved_in_part(saved, tmp_path):
    """Blocks on disk; what stood in the folder stays there."""
    whole = EngrammarForCausalLM.from_pretrained(saved)
    places = {name: "cpu" for name, _ in whole.named_modules() if name.count(".") == 1 or name == "lm_head"}
    places |= {"model.layers": "disk", "model.memory": "disk"}
    moved = EngrammarForCausalLM.from_pretrained(saved, device_map=places, offload_folder=tmp_path / "offloaded")
    assert next(moved.model.layers.parameters()).is_meta
    with torch.no_grad():
        assert torch.equal(moved(IDS).logits, whole(IDS).logits)
    whole.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="other weights are offloaded: load the model whole"):
        moved.save_pretrained(tmp_path / "model")
    verify_folder(tmp_path / "model")
