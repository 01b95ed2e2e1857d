"""`engrammar edit`: from a file of facts to a patch that a small model answers with."""

import json

import pytest

from attached_models import base_model, tokenizer
from engrammar_cli.main import main

ROWS = [("w3 w4", "w20"), ("w5 w6", "w21 w22"), ("w7 w8", "w23")]


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
    main(["edit", "show", patch])
    said = capsys.readouterr().out
    assert "for a LlamaForCausalLM of 4 blocks" in said and "w5 w6 | w9 w5 w6 w10 w11 | w21 w22" in said
    main(["edit", "check", model, patch, "--max-new-tokens", "2"])
    assert "of 3 facts are answered" in capsys.readouterr().out
    main(["generate", model, "w9 w3 w4 w10 w11", "--patch", patch, "--temperature", "0", "--max-new-tokens", "1"])
    assert capsys.readouterr().out.startswith("w9 w3 w4 w10 w11")


def test_a_file_that_is_no_patch_is_one_sentence(folder, capsys):
    (folder / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        main(["edit", "show", str(folder / "no.safetensors")])
    assert capsys.readouterr().err.startswith("engrammar: ")
