"""The page and the PDF follow from the JSON: one changed number shows, and a report that does not follow is refused."""

import io
import json
import re

import pytest
from PIL import Image
from report_results import blank_pictures, everything, made, made_allocation, made_tasks

from committed import RESULTS
from engrammar_cli.main import main
from engrammar_lab import report
from engrammar_lab.catalogue import STUDIES
from engrammar_lab.report import load_results, make_report, write_report
from engrammar_lab.report.page import render_page, without_figures
from engrammar_lab.report.pdf import render_pdf
from engrammar_lab.report.studies import apart, scores

SMALL = {"boundary": made("boundary", {"end of text": [2.0, 2.1], "start of row": [1.9, 1.95]})}


def put(folder, results):
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))


@pytest.fixture
def written(tmp_path, monkeypatch):
    blank_pictures(monkeypatch)
    put(tmp_path, SMALL)
    write_report(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_report_made_again_is_the_same_to_the_byte(tmp_path):
    put(tmp_path, SMALL)
    write_report(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("report.html", "report.pdf")}
    write_report(tmp_path, check=True)
    write_report(tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert before["report.pdf"].startswith(b"%PDF-") and b"D:20261124000000" in before["report.pdf"]


def test_changed_json_pages_and_pdfs_are_refused(written):
    source, page, pdf = (written / name for name in ("boundary.json", "report.html", "report.pdf"))
    kept = {path: path.read_bytes() for path in (source, page, pdf)}
    for path, old, new in (
        (source, b"1.95", b"1.96"),
        (page, b"settled", b"Settled"),
        (pdf, b"%%EOF", b"%%EOF\n"),
    ):
        assert old in kept[path]
        path.write_bytes(kept[path].replace(old, new))
        with pytest.raises(ValueError, match="does not follow from the JSON"):
            write_report(written, check=True)
        path.write_bytes(kept[path])
    write_report(written, check=True)
    pdf.unlink()
    with pytest.raises(ValueError, match=r"report.pdf does not follow"):
        write_report(written, check=True)


def repainted(png: bytes, box: tuple[int, int, int, int], by: int) -> bytes:
    """The picture, a box of it darker."""
    picture, out = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.paste(picture.crop(box).point(lambda level: max(level - by, 0)), box)
    picture.save(out, "png")
    return out.getvalue()


@pytest.mark.slow
def test_figures_may_differ_by_what_processors_round_and_by_nothing_one_sees(tmp_path):
    put(tmp_path, SMALL)
    made_here = make_report(SMALL)
    first, *others = [figure.png for figure in made_here.figures]
    for new, follows in (
        (repainted(first, (300, 100, 303, 103), 36), True),
        (repainted(first, (300, 100, 303, 103), 255), False),
        (others[0], False),
        (first[:-30], False),
        (b"", False),
    ):
        elsewhere = made_here.with_figures([new, *others])
        (tmp_path / "report.html").write_text(render_page(elsewhere))
        (tmp_path / "report.pdf").write_bytes(render_pdf(elsewhere if follows else made_here))
        if follows:
            write_report(tmp_path, check=True)
            (tmp_path / "report.pdf").write_bytes(render_pdf(made_here))
            with pytest.raises(ValueError, match=r"report.pdf does not follow"):
                write_report(tmp_path, check=True)
        else:
            with pytest.raises(ValueError, match=r"A figure of .*report.html does not follow"):
                write_report(tmp_path, check=True)


def test_other_versions_leave_figures_uncompared_and_text_compared(written, monkeypatch, capsys):
    page = written / "report.html"
    monkeypatch.setattr(report, "_versions", lambda: "matplotlib 1.0")
    page.write_text(page.read_text().replace("base64,iVBOR", "base64,iVBOS"))
    write_report(written, check=True)
    assert "Figures were not compared" in capsys.readouterr().out
    page.write_text(page.read_text().replace("1.9250", "1.9251"))
    with pytest.raises(ValueError, match=r"report.html does not follow"):
        write_report(written, check=True)


def test_a_pdf_of_other_json_is_refused_where_versions_differ(written, monkeypatch):
    monkeypatch.setattr(report, "_versions", lambda: "matplotlib 1.0")
    pdf = written / "report.pdf"
    digest = make_report(load_results(written)).digest.encode()
    pdf.write_bytes(pdf.read_bytes().replace(digest, digest[::-1]))
    with pytest.raises(ValueError, match="is of other JSON"):
        write_report(written, check=True)


def test_numbers_of_the_page_come_from_the_json(monkeypatch):
    blank_pictures(monkeypatch)
    before = render_page(make_report(SMALL))
    assert "1.9250 ± 0.0354" in before
    changed = made("boundary", {"end of text": [2.0, 2.1], "start of row": [1.9, 1.97]})
    after = render_page(make_report({"boundary": changed}))
    assert "1.9250 ± 0.0354" not in after and "1.9350 ± 0.0495" in after
    assert without_figures(before) != without_figures(after)


def test_a_section_appears_with_its_json_and_is_listed_as_not_run_without(monkeypatch):
    blank_pictures(monkeypatch)
    small = make_report(SMALL)
    assert [section.key for section in small.sections] == ["boundary"]
    assert len(small.missing) == len(report.SECTIONS) - 1
    page = render_page(make_report({"boundary": SMALL["boundary"], "tasks": made_tasks()}))
    assert 'id="tasks"' in page and "Not run:" in page and "Not run: Do tasks" not in page
    assert page.count("<tr>") > 3 and "<script" not in page and page.count('href="#tasks"') == 2
    assert not re.search(r'(src|href)="(?!data:|#|report\.pdf)', page)  # nothing is fetched


def test_the_date_is_the_newest_results_and_text_is_escaped(monkeypatch):
    blank_pictures(monkeypatch)
    results = {"allocation": made_allocation(), "tasks": made_tasks()}
    results["tasks"]["command"] = "engrammar <tasks>"
    made_from = make_report(results)
    assert made_from.date == "2026-11-25"
    page = render_page(made_from)
    assert "<code>engrammar &lt;tasks&gt;</code>" in page and "<tasks>" not in page


def test_an_empty_folder_and_broken_json_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="holds no results"):
        write_report(tmp_path)
    (tmp_path / "boundary.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        write_report(tmp_path)
    with pytest.raises(SystemExit):
        main(["lab", "report", "--results", str(tmp_path / "none")])
    assert "holds no results" in capsys.readouterr().err


@pytest.mark.slow
def test_every_section_is_rendered_into_both_files(tmp_path):
    put(tmp_path, everything())
    write_report(tmp_path)
    write_report(tmp_path, check=True)
    page = (tmp_path / "report.html").read_text()
    assert "Not run" not in page and all(f'id="{name}"' in page for name in report.SECTIONS)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2e6


UNDER_WAY = {"rates", "horizon"}  # they take days, and their sections say how many runs are done


@pytest.mark.slow
def test_the_committed_report_follows_from_the_committed_json():
    write_report(RESULTS / "lab", check=True)
    for name, result in load_results(RESULTS / "lab").items():
        if name in STUDIES:
            if name in UNDER_WAY:
                assert {run["point"] for run in result["runs"]} <= set(STUDIES[name].points)
            else:
                assert list(scores(result)) == list(STUDIES[name].points)
                assert len({run["seed"] for run in result["runs"]}) >= 3
            if STUDIES[name].equal:
                assert max(apart(result)[kind] for kind in ("total_parameters", "active_parameters")) < 0.005
