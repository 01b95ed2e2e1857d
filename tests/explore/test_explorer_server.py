"""The server answers its own page and nothing else, and says no to everything that is too much."""

import base64
import http.client
import json
import re
import socket
import threading
import time

import pytest
import torch
from browser import served

from attached_models import base_model, tokenizer
from edited_models import small_patch
from engrammar.edit.files import patch_bytes
from engrammar_explore import serving
from engrammar_explore.session import Explored, Session

TEXT = "w9 w3 w4 w10 w11"
JSON = {"content-type": "application/json"}
FILE = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def server():
    model = base_model("llama").requires_grad_(False)
    session = Session(Explored(model=model, tokenizer=tokenizer(), title="<b>tiny</b>"))
    with served(session) as server:
        server.session = session
        yield server


def send(server, method: str, path: str, body: bytes = b"", headers: dict | None = None) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.socket.getsockname()[1], timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def ask(server, what: str, given: object, **headers) -> list[dict]:
    """The lines of an answer."""
    body = json.dumps(given).encode()
    lines = send(server, "POST", f"/api/{what}?token={server.token}", body, JSON | headers)[2]
    return [json.loads(line) for line in lines.splitlines()]


def test_it_listens_on_loopback_and_prints_a_link_with_a_token(server):
    host, port = server.socket.getsockname()
    assert host == "127.0.0.1" and server.url == f"http://127.0.0.1:{port}/?token={server.token}"
    assert len(server.token) >= 32


def test_a_port_that_is_taken_and_hosts_without_a_name_are_refused(server):
    with pytest.raises(ValueError, match="0 for one that is free"):
        serving.Server(server.session, port=server.socket.getsockname()[1])
    for host in ("0.0.0.0", "::", ""):
        with pytest.raises(ValueError, match="every address of this machine"):
            serving.Server(server.session, host)


def test_the_page_and_its_parts_are_served_with_a_strict_policy(server):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, body = send(server, "GET", path)
        assert status == 200 and headers["content-type"].startswith(kind) and body
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    page = send(server, "GET", "/")[2].decode()
    assert not re.search(r"<style|<script(?! defer src=)|\s(style|on[a-z]+)=|//", page)


def test_answers_are_those_of_the_session(server):
    assert ask(server, "about", {})[-1]["result"]["class"] == "LlamaForCausalLM"
    told = ask(server, "look", {"text": TEXT})[-1]["result"]
    assert [token["text"] for token in told["tokens"]] == ["w9", " w3", " w4", " w10", " w11"]
    closer = ask(server, "token", {"text": TEXT, "compare": "first", "position": 2})[-1]["result"]
    assert closer["guesses"] == json.loads(json.dumps(server.session.closer(TEXT, "first", 2)))["guesses"]
    page = ask(server, "export", {"text": TEXT})
    assert [line["progress"][0] for line in page[:-1]] == [0, 1, 2, 3, 4]
    assert page[-1]["result"].startswith("<!doctype html>")


def test_patches_are_loaded_applied_saved_and_undone(server):
    data = patch_bytes(small_patch(server.session.explored.model, "one", (8, 10)))
    path = f"/api/load?token={server.token}"
    status, _, body = send(server, "POST", path, data, FILE)
    assert status == 200 and json.loads(body)["result"]["name"] == "one"
    assert ask(server, "apply", {"name": "one"})[-1]["result"]["patches"][0]["applied"]
    assert ask(server, "apply", {"name": "one"})[-1]["error"].startswith("A patch 'one' is applied already")
    saved = send(server, "POST", f"/api/save?token={server.token}&name=one")[2]
    assert base64.b64decode(json.loads(saved)["result"]["base64"]) == data
    assert not ask(server, "undo", {"name": "one"})[-1]["result"]["patches"][0]["applied"]
    assert ask(server, "forget", {"name": "one"})[-1]["result"]["patches"] == []


def hostile(token: str, port: int) -> list[tuple[str, str, bytes, dict]]:
    """Fifty requests that no page of the explorer sends."""
    look, right = json.dumps({"text": TEXT}).encode(), f"/api/look?token={token}"
    apply, fact = json.dumps({"name": "one"}).encode(), {"subject": "w3", "prompt": "w3", "object": "w4"}
    host = f"127.0.0.1:{port}"
    found = [
        ("POST", right, look, JSON | {"Host": other})
        for other in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", f"127.0.0.1.evil:{port}",
                      f"0.0.0.0:{port}", "", f"{host}.", f"{host}@evil.example", "localhost")
    ]  # fmt: skip
    found += [
        ("POST", right, look, JSON | {"Origin": origin})
        for origin in ("http://evil.example", "null", f"https://{host}", f"http://{host}.evil", "http://127.0.0.1",
                       f"http://evil.example:{port}", "file://", "")
    ]  # fmt: skip
    found += [("POST", right, look, JSON | {"Sec-Fetch-Site": site}) for site in ("cross-site", "same-site")]
    found += [
        ("POST", f"/api/{what}{query}", apply, JSON)
        for what, query in (
            ("look", ""), ("apply", ""), ("undo", "?token="), ("learn", "?token=wrong"), ("forget", f"?token={token}x"),
            ("apply", f"?token={token}&token=x"), ("save", "?name=one"), ("load", f"?token={token[:-1]}"),
            ("export", f"?Token={token}"), ("about", f"#token={token}"),
        )
    ]  # fmt: skip
    found += [
        ("GET", path, b"", {})
        for path in ("/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/../../pyproject.toml", "/..%2fserving.py",
                     "/static/page.js", "//etc/passwd", "/api/look", "/C:%5Cwindows", "/page.css%00.html")
    ]  # fmt: skip
    found += [(method, right, look, JSON) for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")]
    found += [
        ("POST", right, b"x" * (serving.MOST_JSON + 1), JSON),
        ("POST", right, b"not json", JSON),
        ("POST", right, b"[1, 2]", JSON),
        ("POST", right, b"[" * 100_000, JSON),
        ("POST", right, look, {"content-type": "text/plain"}),
        ("POST", right, json.dumps({"text": "w3 " * 600}).encode(), JSON),
        ("POST", right, b'{"text": "\\ud800"}', JSON),
        ("POST", right, b'{"text": 7}', JSON),
        ("POST", f"/api/token?token={token}", json.dumps({"text": TEXT, "position": "../1"}).encode(), JSON),
        ("POST", f"/api/apply?token={token}", json.dumps({"name": "../../etc/passwd"}).encode(), JSON),
        ("POST", f"/api/save?token={token}&name=../../etc/passwd", b"", {}),
        ("POST", f"/api/load?token={token}", b"\x08" + b"\x00" * 7 + b'{"a":1}', FILE),
        ("POST", f"/api/load?token={token}", b"/etc/passwd", {"content-type": "application/json"}),
        ("POST", f"/api/learn?token={token}", json.dumps({**fact, "subject": "w3" * 2000}).encode(), JSON),
        ("POST", f"/api/learn?token={token}", json.dumps({**fact, "keep": ["w5"] * 99}).encode(), JSON),
    ]  # fmt: skip
    return found


def test_fifty_hostile_requests_are_refused_and_the_model_is_untouched(server):
    session = server.session
    before = {name: weight.clone() for name, weight in session.explored.model.state_dict().items()}
    state = session.version, dict(session.patches)
    requests = hostile(server.token, server.socket.getsockname()[1])
    assert len(requests) >= 50
    for method, path, body, headers in requests:
        status, given, answer = send(server, method, path, body, headers)
        assert status >= 400, (method, path, headers, answer[:200])
        assert b"root:" not in answer and "access-control-allow-origin" not in {name.lower() for name in given}
        assert "default-src 'none'" in given.get("content-security-policy", "default-src 'none'")
    assert (session.version, dict(session.patches)) == state
    assert all(torch.equal(weight, before[name]) for name, weight in session.explored.model.state_dict().items())
    assert ask(server, "look", {"text": TEXT})[-1]["result"][
        "tokens"
    ]  # the control: the page's own request is answered


def test_headers_that_never_end_and_two_hosts_are_refused(server):
    for raw in (
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: " + b"y" * 100_000,
        f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.socket.getsockname()[1]}\r\nHost: evil.example\r\n\r\n".encode(),
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(server.socket.getsockname(), timeout=60) as connection:
            connection.sendall(raw)
            assert connection.recv(100).split(b"\r\n")[0].split()[1].startswith(b"4")


def test_only_a_few_requests_wait_for_the_model(server, monkeypatch):
    go_on, busy, told = threading.Event(), threading.Semaphore(0), []

    def slow(text, compare):
        go_on.wait(60)
        return {}

    def asks() -> None:
        told.append(ask(server, "look", {"text": TEXT})[-1])
        busy.release()

    monkeypatch.setattr(server.session, "look", slow)
    threads = [threading.Thread(target=asks) for _ in range(serving.MOST_WAITING + 3)]
    try:
        for thread in threads:
            thread.start()
        assert all(busy.acquire(timeout=60) for _ in range(3))  # three are refused while the others wait
        assert all("busy" in one["error"] for one in told)
    finally:
        go_on.set()
        for thread in threads:
            thread.join()
    assert told[3:] == [{"result": {}}] * serving.MOST_WAITING
    monkeypatch.undo()
    assert ask(server, "look", {"text": TEXT})[-1]["result"]["tokens"]  # they have left their places


def test_work_of_a_page_that_has_gone_away_ends(server, monkeypatch):
    ended, steps = threading.Event(), []

    def long(text, compare, progress):
        try:
            for step in range(2000):
                progress(step, 2000, "working")
                steps.append(step)
                time.sleep(0.01)
        finally:
            ended.set()

    monkeypatch.setattr(server.session, "whole", long)
    body = json.dumps({"text": TEXT}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.socket.getsockname()[1], timeout=60)
    connection.request("POST", f"/api/export?token={server.token}", body, JSON)
    connection.getresponse().readline()
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert ended.wait(60) and len(steps) < 2000


def test_a_model_that_fails_is_said_and_the_server_goes_on(server, monkeypatch, capfd):
    def fail(text, compare):
        raise RuntimeError("no more numbers")

    monkeypatch.setattr(server.session, "look", fail)
    assert ask(server, "look", {"text": TEXT})[-1]["error"] == "The model failed (RuntimeError: no more numbers)."
    monkeypatch.undo()
    assert ask(server, "look", {"text": TEXT})[-1]["result"]["tokens"]
