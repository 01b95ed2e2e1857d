"""`engrammar table`: each command says in a line what it did, and in a sentence what is wrong."""

import json

import pytest

from engrammar_cli.main import main
from table_folders import write_folder


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "tables")
    return tmp_path / "tables"


def run(capsys, *args):
    main([*(() if args[0] == "verify" else ("table",)), *map(str, args)])
    return capsys.readouterr().out


def test_info_describes_the_tables(folder, capsys):
    first, header, _, *lines = run(capsys, "info", folder).splitlines()
    assert first.endswith("rows in bf16")
    assert header.split() == ["layer", "rows", "width", "bytes", "a", "row", "bytes", "files", "checksums"]
    assert lines[0].split() == ["1", "220", "6", "12", "2,640", "1", "yes"]
    about = json.loads(run(capsys, "info", folder, "--json"))
    assert about["encoding"] == "bf16" and about["tables"]["3"]["page_checksums"] is True


def test_verify_counts_what_it_read(folder, capsys):
    num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    (folder / "README.md").write_text("What a table.")
    said = run(capsys, "verify", folder)
    assert f"{num_bytes:,} bytes are as they were written" in said and "without a checksum: README.md" in said


def test_pack_and_quantize_make_folders(folder, capsys, tmp_path):
    assert "in bf16, in 7 files" in run(capsys, "pack", folder, tmp_path / "packed", "--shard-bytes", 1000)
    text = run(capsys, "quantize", tmp_path / "packed", tmp_path / "small", "--encoding", "int8")
    assert "in int8, in 2 files" in text and "table 3: relative RMS error 0." in text
    assert "bytes are as they were written" in run(capsys, "verify", tmp_path / "small")


def test_a_mistake_is_one_sentence_and_exit_code_2(folder, capsys, tmp_path):
    for args in (("info", tmp_path), ("pack", folder, folder), ("info", tmp_path / "nowhere")):
        with pytest.raises(SystemExit) as caught:
            main(["table", *map(str, args)])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("engrammar: ") and error.count("\n") == 1
