"""What the parsers of the pocket corpora make of each package's markup, on small trees made here."""

import gzip
import json

from dictionaries import write_dictd
from engrammar.train import parsers
from engrammar.train.parsers import Entry


def test_each_definition_of_a_dictionary_is_read_once_in_file_order(tmp_path):
    definitions = {"00-database-info": b"notes", "zebra|quagga": b"Zebra\n", "ape": b"Ape" * 2000, "bee": b"it\x92s\n"}
    write_dictd(tmp_path, "any", definitions)
    assert list(parsers._read_dictd(tmp_path, "any")) == ["Zebra\n", "Ape" * 2000, "it’s\n"]


def test_gcide_text_has_no_pronunciation_etymology_or_markup(tmp_path):
    raw = (
        'Hammer \\Ham"mer\\ (h[a^]m"m[~e]r), n. [OE. hamer, F. [`a] la. See {Home}.]\n'
        "   1. A tool of the for[^e]t for\n      driving {nails}; an [ae]gis. [Obs.]\n      [1913 Webster]\n\n"
        "            Closing rivets up.   --Shak.\n      [1913 Webster]\n"
    )
    write_dictd(tmp_path, "gcide", {"Hammer": raw.encode()})
    text = "Hammer, n. 1. A tool of the forêt for driving nails; an ægis.\n\nClosing rivets up. --Shak."
    assert list(parsers.parse_gcide(tmp_path)) == [Entry("Hammer", text)]


def test_a_wordnet_gloss_names_its_words_and_part_of_speech(tmp_path):
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    for kind in ("noun", "verb", "adv"):
        (folder / f"data.{kind}").write_text("  1 the licence\n")
    line = '00001 00 a 02 galore(ip) 0 in_plenty 0 001 & 00 a 0000 | in great numbers; "gifts galore"  \n'
    (folder / "data.adj").write_text("  1 the licence\n" + line)
    text = 'galore, in plenty (adjective): in great numbers; "gifts galore"'
    assert list(parsers.parse_wordnet(tmp_path)) == [Entry("galore", text)]


def test_the_manual_loses_its_markup_and_keeps_its_words_and_code():
    page = """.. _anchor:

:mod:`heapq` --- Heaps
======================

.. index:: single: heap
   pair: a; b

.. function:: heappush(heap, item)
   :noindex:

   Like :func:`~heapq.heappop` but ``faster``, see `the page <https://example.org>`_::

      heap = {1: 2}

   .. versionadded:: 3.1
"""
    expected = """heapq --- Heaps

heappush(heap, item)

   Like heapq.heappop but faster, see the page:

      heap = {1: 2}

   New in version 3.1"""
    assert parsers._read_rst(page) == expected


def test_the_manual_of_perl_loses_its_codes_and_keeps_its_words_and_code(tmp_path):
    folder = tmp_path / "usr/share/perl/5.36.0/pod"
    folder.mkdir(parents=True)
    page = """=encoding utf8

=head1 NAME

perlé - see L<the page|perlfunc/print>, L<perlop>

=over 4

=item C<< $a <=> $b >>X<spaceship>

Returns I<one of B<three>>; C<1 E<lt> 2>, aE<sol>b, E<233>.

    my %h = (a => 1);

=back

=begin html

<b>not text</b>

=end html

Done.
"""
    (folder / "perlé.pod").write_text(page, encoding="utf-8")
    text = """NAME

perlé - see the page, perlop

$a <=> $b

Returns one of three; 1 < 2, a/b, é.

    my %h = (a => 1);

Done."""
    assert list(parsers.parse_pod(tmp_path)) == [Entry("perlé", text)]


def test_a_service_says_each_paragraph_once(tmp_path):
    folder = tmp_path / "botocore/data/s3/2006-03-01"
    folder.mkdir(parents=True)
    shared = "<p>The <code>bucket</code>&amp;its name.</p>"
    service = {
        "operations": {"PutObject": {"documentation": "<p>Adds an object.</p> <p>You must own it.</p>"}},
        "shapes": {
            "PutRequest": {"type": "structure", "members": {"Bucket": {"documentation": shared}, "Key": {}}},
            "Read": {"documentation": shared, "members": {"Bucket": {"documentation": "<p>You must own it.</p>"}}},
        },
    }
    (folder / "service-2.json.gz").write_bytes(gzip.compress(json.dumps(service).encode()))
    assert list(parsers.parse_aws(tmp_path)) == [
        Entry("PutObject", "s3 PutObject\nAdds an object.\nYou must own it."),
        Entry("PutRequest", "s3 PutRequest\nBucket: The bucket&its name."),
    ]


def test_python_sources_are_read_without_tests_and_empty_files(tmp_path):
    for name, source in {
        "a/b.py": "x = 1\n",
        "a/tests/test_b.py": "assert 1\n",
        "a/__init__.py": "",
        "a/c.txt": "c",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert list(parsers.parse_python(tmp_path)) == [Entry("a/b.py", "x = 1")]
