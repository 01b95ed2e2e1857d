"""`engrammar explore`: a census, and a page of a model with an adapter and a patch."""

import json
import re

import pytest

from attached_models import attached_model, base_model, tokenizer
from edited_models import small_patch
from engrammar.attach import save_attached
from engrammar.edit import write_patch
from engrammar_cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore")
    base = base_model("llama")
    base.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    save_attached(attached_model("llama", {"layers": (2,)}), folder / "adapter")
    write_patch(small_patch(base, "one", (8, 10)), folder / "one.safetensors")
    (folder / "text.txt").write_text("w3 w4 w5 w3 w4 w6 w7 w8 " * 30)
    return folder


def told(path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text())[1])


def test_a_census_and_a_page_of_an_adapter_with_a_patch(folder, capsys):
    model, common = str(folder / "model"), ["--adapter", str(folder / "adapter"), "--census", str(folder / "census")]
    main(["explore", "census", str(folder / "text.txt"), model, *common])
    assert "240 tokens of" in capsys.readouterr().out
    page = folder / "page.html"
    export = ["--export", str(page), "--text", "w3 w4 w5", "--patch", str(folder / "one.safetensors")]
    main(["explore", model, *common, *export, "--memory", "disk"])
    assert f"{page.stat().st_size:,} bytes" in capsys.readouterr().out
    data = told(page)
    assert data["about"]["title"] == "model with adapter" and data["about"]["patches"][0]["applied"]
    assert data["look"]["traffic"][0]["tier"] == "disk"
    bigram = data["look"]["details"][1]["memories"][0]["orders"][0]
    assert bigram["count"] == 60 and bigram["rows"][0]["shared"]["num"] >= 0


def test_a_plain_model_is_explored_too(folder):
    main(["explore", str(folder / "model"), "--export", str(folder / "plain.html"), "--text", "w3 w4"])
    assert "no memory" in told(folder / "plain.html")["look"]["notes"][0]


def test_mistakes_are_one_sentence(folder, capsys):
    model = str(folder / "model")
    for given, said in (
        ([], "needs MODEL"),
        (["counts", "text", model], "needs MODEL"),
        (["census", str(folder / "text.txt"), model], "needs --census"),
        (["census", str(folder / "text.txt"), model, "--census", str(folder / "no")], "this model has none"),
        ([model, "--export", str(folder / "x.html")], "needs --text"),
        ([model, "--memory", "disk", "--export", str(folder / "x.html"), "--text", "w3"], "leave --memory out"),
        ([model, "--cache-rows", "8", "--export", str(folder / "x.html"), "--text", "w3"], "add --memory disk"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["explore", *given])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and said in error, error
