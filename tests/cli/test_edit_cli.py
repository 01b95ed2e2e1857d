"""`engrammar edit`: from a file of facts to a patch that a small model answers with."""

import json
from dataclasses import fields

import pytest

from attached_models import base_model, tokenizer
from edited_models import OURS
from engrammar.edit.files import read_patch
from engrammar.edit.learning import SETTINGS
from engrammar_cli import edit
from engrammar_cli.main import main
from steerable_models import FACTS, SEEDS, steerable

ROWS = [("w3 w4", "w20"), ("w5 w6", "w21 w22"), ("w7 w8", "w23")]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where what facts share is kept."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    base_model("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"subject": s, "prompt": f"w9 {s} w10 w11", "object": o}) for s, o in ROWS]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_facts_are_learned_shown_and_checked(folder, capsys):
    model, patch = str(folder / "model"), str(folder / "p.safetensors")
    main(["edit", "learn", model, str(folder / "facts.jsonl"), "--out", patch])
    assert "3 of 3 facts" in capsys.readouterr().out
    assert [path.suffix for path in (folder / "home/.cache/engrammar").iterdir()] == [".safetensors"] * 3
    main(["edit", "show", patch])
    said = capsys.readouterr().out
    assert "for a LlamaForCausalLM of 4 blocks" in said and "w5 w6 | w9 w5 w6 w10 w11 | w21 w22" in said
    main(["edit", "check", model, patch, "--max-new-tokens", "2"])
    assert "of 3 facts are answered" in capsys.readouterr().out
    main(["generate", model, "w9 w3 w4 w10 w11", "--patch", patch, "--temperature", "0", "--max-new-tokens", "1"])
    assert capsys.readouterr().out.startswith("w9 w3 w4 w10 w11")


def test_a_patch_is_applied_in_a_folder_undone_and_forgotten(folder, capsys):
    model, patch = folder / "model", folder / "p.safetensors"
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    asking = ["generate", str(model), "w9 w3 w4 w10 w11", "--temperature", "0", "--max-new-tokens", "1"]
    main(asking)
    plain = capsys.readouterr().out.splitlines()[-1]
    main(["edit", "learn", str(model), str(folder / "facts.jsonl"), "--out", str(patch), "--name", "three"])
    assert not (folder / "p.safetensors.parts").exists()
    main([*asking, "--patch", str(patch)])
    answered = capsys.readouterr().out.splitlines()[-1]
    assert answered != plain
    main(["edit", "apply", str(model), str(patch)])
    main(asking)
    assert capsys.readouterr().out.splitlines()[-1] == answered
    main(["edit", "forget", str(model), "w3 w4"])
    said = capsys.readouterr().out
    assert "proof: 0 of its keys left, 0 of its rows left, 0 of 20 phrasings answered with it" in said
    with pytest.raises(SystemExit):
        main(["edit", "forget", str(model), "w3 w4"])
    assert "holds a fact about 'w3 w4'" in capsys.readouterr().err
    main(["edit", "undo", str(model), "three"])
    assert {path.name: path.read_bytes() for path in model.iterdir()} == files
    main(asking)
    assert capsys.readouterr().out.splitlines()[-1] == plain


def test_what_a_patch_touches_is_shown(folder, capsys, monkeypatch):
    model, patch = str(folder / "model"), str(folder / "p.safetensors")
    (folder / "text.txt").write_text("w1 w3 w4 w2 w2 w3 w4 w30")
    main(["edit", "learn", model, str(folder / "facts.jsonl"), "--out", patch])
    capsys.readouterr()
    main(["edit", "show", patch, "--model", model, "--text", str(folder / "text.txt")])
    said = capsys.readouterr().out
    assert "2 of 8 tokens of" in said and "2 times 'w3w4'" in said.replace(" w4", "w4").replace("W", "w")
    for size in (2, 3, 5):  # a key that begins in one piece of the text and ends in the next is one
        monkeypatch.setattr(edit, "TOKENS", size)
        main(["edit", "show", patch, "--model", model, "--text", str(folder / "text.txt")])
        assert capsys.readouterr().out == said
    assert said.count("of 20 phrasings reach") == 3
    with pytest.raises(SystemExit):
        main(["edit", "show", patch, "--text", str(folder / "text.txt")])
    assert "--text needs --model" in capsys.readouterr().err


def test_a_file_that_is_no_patch_is_one_sentence(folder, capsys):
    (folder / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        main(["edit", "show", str(folder / "no.safetensors")])
    assert capsys.readouterr().err.startswith("engrammar: ")


def test_settings_of_a_method_are_taken_and_kept_in_the_patch(folder, capsys):
    model, facts, patch = (str(folder / name) for name in ("model", "facts.jsonl", "p.safetensors"))
    main(["edit", "learn", model, facts, "armed=20", "strength=3e1", "--out", patch, "--no-cache"])
    assert not (folder / "home").exists()
    told = read_patch(patch)
    assert "armed=20, strength=30.0" in told.provenance["settings"] and told.column("armed").max() == 20


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (["armd=20"], "There is no setting 'armd'; known here: ridge, match_above"),
        (["armed=0"], "armed is 0; allowed: 1 to 512."),
        (["armed=a few"], "armed is 'a few'; allowed: int."),
        (["armed"], "The override 'armed' has no '='"),
        (["steps=20"], "There is no setting 'steps'"),
        (["steps=0", "--method", "vector"], "steps is 0; allowed: 1 or more."),
    ],
)
def test_wrong_settings_are_one_sentence(given, wrong, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["edit", "learn", "nowhere", "nothing.csv", *given, "--out", str(tmp_path / "p.safetensors")])
    assert wrong in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_help_tells_every_setting_and_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["edit", "learn", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", "").split()).split("gated: ")[1]  # lines end anywhere
    for method, kind in SETTINGS.items():
        told = said.split(f"{method}: ")[-1].split(". ")[0].replace(" (or gradient)", "").split()
        wanted = {f"{one.name}={'null' if one.default is None else one.default}" for one in fields(kind)}
        assert set(told) == wanted, method


def test_facts_in_hashed_rows_are_forgotten_with_the_model_at_hand(tmp_path, capsys):
    steerable(OURS).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"subject": f.subject, "prompt": f.prompt, "object": f.object}) for f in FACTS]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    model, patch = str(tmp_path / "model"), str(tmp_path / "p.safetensors")
    chosen = [
        "num_contexts=1",
        "num_paraphrases=0",
        "num_others=2",
        "steps=60",
        "stop=0.5",
        "most=40",
        "kl=0.1",
    ]
    learning, said = ["edit", "learn", model, str(tmp_path / "facts.jsonl"), *chosen], []
    for seed in SEEDS:
        main([*learning, f"seed={seed}", "--method", "rows", "--out", patch])
        said.append(capsys.readouterr().out)
        if "2 of 2 facts" in said[-1]:
            break
    assert "2 of 2 facts" in said[-1]
    with pytest.raises(SystemExit):
        main(["edit", "forget", patch, FACTS[0].subject])
    assert "give the model and its tokenizer" in capsys.readouterr().err
    main(["edit", "forget", patch, FACTS[0].subject, "--model", model])
    assert "0 of its rows left, 0 of 20 phrasings answered with it" in capsys.readouterr().out
    main(["edit", "apply", model, patch])
    with pytest.raises(SystemExit):
        main(["edit", "forget", model, FACTS[1].subject])
    assert "Of what is in its tables (facts), undo the patch" in capsys.readouterr().err


def test_facts_that_were_learned_in_bf16_are_said_in_fp32_and_the_other_way_round(folder, capsys):
    saved, half = folder / "model", folder / "half"
    base_model("llama").bfloat16().save_pretrained(half)
    tokenizer().save_pretrained(half)
    said = set()
    for dtype in ("float32", "bfloat16"):
        patch = str(folder / f"{dtype}.safetensors")
        main(["edit", "learn", str(half), str(folder / "facts.jsonl"), "--out", patch, "--dtype", dtype])
        for model in (saved, half):
            capsys.readouterr()
            main(["edit", "check", str(model), patch, "--max-new-tokens", "2"])
            said.add(next(line for line in capsys.readouterr().out.splitlines() if "facts are answered" in line))
    assert said == {"3 of 3 facts are answered."}
