"""The explorer in a real browser: typed, clicked, a fact edited, undone, exported, and the exported file read."""

import json
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest
from browser import browsing, open_page, screenshots, served, until, why_no_browser
from PIL import Image
from recording import Story, animate, record

from attached_models import attached_model, tokenizer
from edited_models import OURS, model_of_kind, small_patch
from engrammar.edit.files import patch_bytes
from engrammar_explore import session as module
from engrammar_explore import trying
from engrammar_explore.export import export_page, page_of
from engrammar_explore.session import Explored, Session

pytestmark = pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))
TEXT = "w9 w3 w4 w10 w11"
SHORT = trying.TrySettings(max_new_tokens=2, phrasings=("w12 {}",), others=("{} w14",), neutral="w21 w22 w23")


def new_session(kind: str = "") -> Session:
    model = model_of_kind(OURS) if kind == OURS else attached_model("llama").requires_grad_(False)
    return Session(Explored(model=model, tokenizer=tokenizer(), title="<b>tiny</b>"))


@pytest.fixture(scope="module")
def context():
    with browsing() as context:
        yield context


@pytest.fixture
def page(context):
    with served(new_session()) as server:
        page = open_page(context, server.url)
        page.server = server
        yield page
        assert not page.complaints
        page.close()


def type_text(page, text: str, number: int) -> None:
    """Types a text, and waits until its tokens are drawn."""
    page.fill("#text", text)
    until(page, f"document.querySelectorAll('#strip .token').length === {number}")
    page.wait_for_selector("#strip:not(.stale)")
    until(page, "document.body.dataset.asking === '0'")


def test_a_text_is_typed_and_its_gates_and_a_token_are_read(page):
    type_text(page, TEXT, 5)
    assert page.text_content("#title") == "<b>tiny</b>"
    told = module.closer(page.server.session._see(TEXT, "first"), 2)
    page.click(".token[data-index='2']")
    until(page, "document.querySelector('#token-title').textContent.includes('token 3 of 5')")
    gates = [one["gates"][0] for one in told["memories"]]
    assert page.locator(".gates [role=img]").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))") == [
        f"gate {gate:.3f}" for gate in gates
    ]
    rows = [row["row"] for one in told["memories"] for order in one["orders"] for row in order["rows"]]
    shown = page.locator(".order tbody td:nth-child(2)").all_text_contents()
    assert [int(one.replace(",", "")) for one in shown] == rows
    strip = page.locator(".token[data-index='2'] rect.cell")
    opacities = strip.evaluate_all("all => all.map(one => Number(one.getAttribute('fill-opacity')))")
    assert opacities == pytest.approx(gates, abs=1e-6)


def test_keys_move_through_the_tokens(page):
    type_text(page, TEXT, 5)
    page.focus(".token[data-index='4']")
    for key, position in (
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", 4),
        ("ArrowRight", 4),
    ):
        page.keyboard.press(key)
        page.wait_for_selector(f".token[data-index='{position}'][aria-pressed=true]:focus")
    until(page, "document.querySelector('#token-title').textContent.includes('token 5 of 5')")
    assert page.locator(".token[tabindex='0']").count() == 1


def test_a_fact_is_tried_applied_seen_undone_and_exported(page, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "try_fact", lambda *given: trying.try_fact(*given[:4], SHORT, given[5]))
    type_text(page, TEXT, 5)
    before = page.locator("#token-body table").first.text_content()
    page.fill("#subject", "w3 w4")
    page.fill("#prompt", TEXT)
    page.fill("#object", "w20")
    page.click("text=Try the fact")
    page.wait_for_selector("[data-patch='w3-w4']")
    assert "before" in page.text_content("#tried") and "Other ways to ask" in page.text_content("#tried")
    tried = page.server.session.tried["w3-w4"]
    assert tried["prompt"]["after"]["greedy"].strip() in page.text_content("#tried .answer")
    page.click("[aria-label='Apply w3-w4']")
    page.wait_for_selector("[aria-label='Undo w3-w4']")
    until(page, "document.querySelector('#compare').value === 'patches'")
    page.wait_for_selector("#strip:not(.stale)")
    until(page, "document.querySelector('#token-body thead').textContent.includes('no patch')")
    with page.expect_download() as downloading:
        page.click("[aria-label='Save w3-w4']")
    assert Path(downloading.value.path()).read_bytes() == page.server.session.save("w3-w4")
    with page.expect_download() as downloading:
        page.click("#export")
    exported = tmp_path / "explored.html"
    downloading.value.save_as(exported)
    page.click("[aria-label='Undo w3-w4']")
    page.wait_for_selector("[aria-label='Apply w3-w4']")
    until(page, f"document.querySelector('#token-body table').textContent === {json.dumps(before)}")
    assert page.server.session.about()["patches"][0]["applied"] is False
    read_exported(page.context, exported)


def read_exported(context, path: Path) -> None:
    page = open_page(context, path.as_uri())
    assert page.locator(".token").count() == 5 and not page.is_visible("#text") and not page.is_visible("#fact")
    assert not page.is_visible("label[for=text]")
    page.click(".token[data-index='1']")
    until(page, "document.querySelector('#token-title').textContent.includes('token 2 of 5')")
    assert "w3-w4" in page.text_content("#patches") and "applied" in page.text_content("#patches")
    assert not page.complaints
    page.close()


def test_a_patch_is_loaded_and_compared(page, tmp_path):
    model = page.server.session.explored.model
    for name, seed in (("one", 50), ("two", 51)):
        (tmp_path / name).write_bytes(patch_bytes(small_patch(model, name, (8, 10), seed=seed)))
        page.set_input_files("#load", tmp_path / name)
        page.wait_for_selector(f"[data-patch='{name}']")
    page.click("#comparison button")
    until(page, "document.querySelector('#compared').textContent.includes('1 places')")
    page.click("[aria-label='Apply one']")
    page.wait_for_selector("[aria-label='Undo one']")
    page.click("[aria-label='Apply two']")
    page.wait_for_selector("#problem:not([hidden])")
    assert "change the same differently" in page.text_content("#problem")
    page.complaints.clear()  # the browser notes the refusal
    type_text(page, "w3 w4 w5", 3)  # a reading that ends well does not take the refusal back
    assert "change the same differently" in page.text_content("#problem:not([hidden])")


def test_reload_second_tab_huge_paste_and_markup_behave(page):
    type_text(page, "w3 w4 w5", 3)
    page.reload()
    page.wait_for_selector("body[data-ready=yes]")
    assert page.input_value("#text") == "w3 w4 w5" and page.locator(".token").count() == 3
    other = open_page(page.context, page.server.url)
    type_text(other, TEXT, 5)
    assert page.locator(".token").count() == 3
    other.close()
    for text, said in (("w3 " * 700, "700 tokens; allowed: 512"), ("x" * 200_000, "200,000 characters")):
        page.fill("#text", text)
        until(page, f"document.querySelector('#problem').textContent.includes('{said}')")
    page.complaints.clear()
    type_text(page, "<img src=x onerror=alert(1)> w3", 4)
    assert page.is_hidden("#problem") and page.locator("#strip img, #token img").count() == 0


def test_a_slow_model_is_said_to_be_reading_and_the_last_text_counts(page, monkeypatch):
    type_text(page, TEXT, 5)
    begun, go_on, look = threading.Event(), threading.Event(), page.server.session.look

    def slow(text, compare):
        begun.set()
        assert go_on.wait(60)
        return look(text, compare)

    monkeypatch.setattr(page.server.session, "look", slow)
    page.fill("#text", "w3 w4 w5")
    assert begun.wait(60)
    until(page, "document.getElementById('status').textContent.includes('reading')")
    assert page.locator("#strip.stale .token").count() == 5  # the last text, faint
    page.fill("#text", "w3 w4 w5 w6")
    go_on.set()
    until(page, "document.querySelectorAll('#strip:not(.stale) .token').length === 4")
    until(page, "document.body.dataset.asking === '0'")
    assert page.text_content("#status") == "" and page.is_hidden("#problem")


def test_a_page_without_the_token_says_what_to_do(context):
    with served(new_session()) as server:
        page = open_page(context, server.url.partition("?")[0])
        assert "open the link that the command printed" in page.text_content("#problem")
        page.close()


def test_right_to_left_text_turns_the_strip_and_its_keys(context, tmp_path):
    whole = new_session(OURS).whole(TEXT, "first")
    for token, text in zip(whole["look"]["tokens"], ("שלום", " עולם", " 🙂", " w3", " سلام")):
        token["text"] = text
    export_page(whole, tmp_path / "rtl.html")
    page = open_page(context, (tmp_path / "rtl.html").as_uri())
    assert page.evaluate("getComputedStyle(document.getElementById('strip')).direction") == "rtl"
    page.focus(".token[data-index='4']")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".token[data-index='3'][aria-pressed=true]:focus")
    assert page.locator("#strip").text_content() == "שלום עולם 🙂 w3 سلام"
    page.close()


def test_screenshots_of_both_themes_at_two_widths_are_made(context, tmp_path):
    export_page(new_session(OURS).whole(TEXT, "first"), tmp_path / "page.html")
    made = screenshots(context, (tmp_path / "page.html").as_uri(), tmp_path / "shots")
    assert [path.name for path in made] == ["light-wide.png", "light-narrow.png", "dark-wide.png", "dark-narrow.png"]
    assert len({path.read_bytes() for path in made}) == 4


def test_a_session_is_recorded_and_leaves_the_model_as_it_was(context, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "try_fact", lambda *given: trying.try_fact(*given[:4], SHORT, given[5]))
    session = new_session()
    before = session.look(TEXT)["tokens"]
    with served(session) as server:
        seen = record(context, server.url, Story(text=TEXT, subject="w3 w4", prompt=TEXT, object="w20"))
        assert not session.about()["patches"] and session.look(TEXT)["tokens"] == before
    assert len({picture for _, picture in seen}) == len(seen) == 5
    animate(seen, tmp_path / "session.gif")
    assert Image.open(tmp_path / "session.gif").n_frames == 5


def test_an_exported_page_loads_nothing_and_its_data_are_no_markup():
    told = {"about": {"title": "</script><script>alert(1)</script>\u2028"}, "look": {}}
    page = page_of(told)
    assert page.count("</script>") == 2 and json.loads(re.search(r'id="data">(.*?)</script>', page)[1]) == told
    assert not re.search(r"(src|href)=\"(?!#)", page) and "default-src 'none'" in page


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """axe-core's script, from npm."""
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "axe-core@4.14.1"],
        cwd=folder, capture_output=True, text=True, check=False, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"axe-core cannot be had: {done.stderr.strip()[-200:]}")
    return (folder / "node_modules/axe-core/axe.min.js").read_text()


@pytest.mark.slow
def test_axe_finds_nothing_serious(context, axe, monkeypatch):
    monkeypatch.setattr(module, "try_fact", lambda *given: trying.try_fact(*given[:4], SHORT, given[5]))
    with served(new_session()) as server:
        page = open_page(context, server.url)
        for name, value in (("subject", "w3 w4"), ("prompt", TEXT), ("object", "w20")):
            page.fill(f"#{name}", value)
        page.click("text=Try the fact")
        page.wait_for_selector("[data-patch='w3-w4']")
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        page.evaluate(axe)
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            page.wait_for_timeout(300)
            found = page.evaluate("axe.run().then(result => result.violations)")
            told = [(one["id"], one["impact"], [node["html"][:150] for node in one["nodes"]]) for one in found]
            assert told == [], theme
        page.evaluate("document.querySelectorAll('label[for=object]').forEach(one => one.remove())")
        page.evaluate("document.getElementById('object').removeAttribute('placeholder')")
        broken = page.evaluate("axe.run().then(result => result.violations.map(one => one.id))")
        assert broken  # the control: a field without a label is found
        page.close()
