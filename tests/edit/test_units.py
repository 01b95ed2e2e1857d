"""Learning that was killed goes on where it was, to the same bits; what another request left is refused."""

from dataclasses import replace

import pytest

from attached_models import base_model, tokenizer
from engrammar.edit import GatedSettings, learn, learn_units, request
from engrammar.edit.files import patch_digest

ROWS = [
    {"subject": f"w{n} w{n + 1}", "prompt": f"w9{n % 3} w{n} w{n + 1} w10", "object": f"w{n + 20}"}
    for n in range(1, 13, 2)
]
SETTINGS = GatedSettings(probe_depth=0.75, match_above=9.0, num_worded=0)


@pytest.fixture(scope="module")
def llama():
    return base_model("llama").requires_grad_(False)


def asked(llama, rows=ROWS, learned=None, killed_at=99, settings=SETTINGS):
    """The request; its units note what they learn, and one of them is killed."""
    wanted = request(llama, tokenizer(), rows, settings=settings)
    learned = [] if learned is None else learned

    def noting(index, unit):
        def now():
            if index == killed_at:
                raise KeyboardInterrupt
            learned.append(index)
            return unit.learn()

        return replace(unit, learn=now)

    return wanted._replace(units=[noting(index, unit) for index, unit in enumerate(wanted.units)])


def test_killed_and_continued_is_the_same_to_the_bit(llama, tmp_path):
    at_once = learn(llama, tokenizer(), ROWS, settings=SETTINGS)
    learned: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        learn_units(asked(llama, learned=learned, killed_at=2), folder=tmp_path)
    assert learned == [0, 1]
    (tmp_path / f".{'0' * 8}.partial").write_bytes(b"half of a file")
    continued = learn_units(asked(llama, learned=learned), folder=tmp_path)
    assert learned == [0, 1, 2]
    assert patch_digest(continued.patch) == patch_digest(at_once.patch)
    assert continued.refused == at_once.refused


def test_parts_of_another_request_are_refused_by_what_differs(llama, tmp_path):
    learn_units(asked(llama), folder=tmp_path)
    other = [{**row, "object": "w3"} for row in ROWS]
    with pytest.raises(ValueError, match=r"other facts\): repeat that request"):
        learn_units(asked(llama, other), folder=tmp_path)
    wide = replace(SETTINGS, armed=20, strength=2.0)
    with pytest.raises(ValueError, match=r"armed 16 there, 20 here; strength 1.0 there, 2.0 here\)"):
        learn_units(asked(llama, settings=wide), folder=tmp_path)
    (tmp_path / "request.json").write_text("{")
    with pytest.raises(ValueError, match="its request.json is damaged"):
        learn_units(asked(llama), folder=tmp_path)


def test_a_damaged_part_is_learned_again(llama, tmp_path):
    whole = learn_units(asked(llama), folder=tmp_path)
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text().replace('"patch": "', '"patch": "0'))
    learned: list[int] = []
    again = learn_units(asked(llama, learned=learned), folder=tmp_path)
    assert learned == [0, 1, 2] and patch_digest(again.patch) == patch_digest(whole.patch)
