"""A small dictionary in dictd's format."""

import gzip
from pathlib import Path

from engrammar.train.parsers import DICT_DIGITS


def write_dictd(root: Path, name: str, definitions: dict[str, bytes]) -> None:
    def digits(number: int) -> str:
        return "".join(list(DICT_DIGITS)[number >> shift & 63] for shift in (12, 6, 0)).lstrip("A") or "A"

    folder = root / "usr/share/dictd"
    folder.mkdir(parents=True)
    data, lines = b"", []
    for headwords, definition in definitions.items():
        lines += [f"{word}\t{digits(len(data))}\t{digits(len(definition))}" for word in headwords.split("|")]
        data += definition
    (folder / f"{name}.index").write_text("\n".join(sorted(lines)) + "\n")
    (folder / f"{name}.dict.dz").write_bytes(gzip.compress(data))
