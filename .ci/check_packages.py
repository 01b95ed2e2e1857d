"""Checks the wheel and the source archive in a folder: small, nothing but the package, with its licence.

Usage: python check_packages.py FOLDER
"""

import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGES = {"engrammar", "engrammar_lab", "engrammar_explore", "engrammar_cli"}
KINDS = {".py", ".yaml", ".json", ".typed", ".html", ".css", ".js", ".svg"}
MOST = 2_000_000


def main() -> None:
    folder = Path(sys.argv[1])
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    about = [name for name in names if ".dist-info/" in name]
    code = [name for name in names if name not in about]
    assert {name.split("/")[0] for name in code} == PACKAGES, sorted({name.split("/")[0] for name in code})
    assert not [name for name in code if Path(name).suffix not in KINDS], "files of other kinds"
    assert any(name.endswith("licenses/LICENSE") for name in about)
    with tarfile.open(source) as archive:
        archived = archive.getnames()
    assert any(name.endswith("/LICENSE") for name in archived)
    assert not [name for name in archived if "/results/" in name or "/data/" in name or "/runs/" in name]
    for file in (wheel, source):
        assert file.stat().st_size < MOST, f"{file.name} has {file.stat().st_size:,} bytes"
        print(f"{file.name}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
