"""A short load test: no token is wrong, faults are errors, and the counts of its report can be believed."""

import copy
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from engrammar_lab.bench import load
from engrammar_lab.bench.load import Plan, measure, table, verdict
from engrammar_lab.bench.load_clients import CANCELLED, LOST, RIGHT, WRONG, Clients, Got, Prompt, ask, count
from engrammar_lab.bench.load_faults import damage, replaced
from engrammar_lab.bench.loopback import why_no_pool

TINY = Plan(minutes=1.0, rows_per_head=4001, prompts=6, clients=4, pause=0.1)
FAILED = {"error": {"code": "model_failed", "type": "server_error"}}
ANSWERS = {1: (200, {"choices": [{"token_ids": [5, 6, 7, 8]}]}), 2: (503, FAILED), 3: None}


class Said(BaseHTTPRequestHandler):
    """Answers each request with what stands in `ANSWERS` for the first token of its prompt."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = ANSWERS[body["prompt"][0]]
        if found is None:
            return  # the connection ends without a word
        status, content = found
        raw = json.dumps(content).encode()
        if body["stream"] and status == 200:
            pieces = [{"choices": [{"token_ids": [token]}]} for token in content["choices"][0]["token_ids"]]
            raw = b"".join(f"data: {json.dumps(piece)}\n\n".encode() for piece in pieces) + b"data: [DONE]\n\n"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Said)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_clients_know_right_answers_from_errors(address):
    for streams in (False, True):
        assert ask(address, "m", [1], 4, streams=streams) == (RIGHT, [5, 6, 7, 8])
        assert ask(address, "m", [2], 4, streams=streams) == ("503 model_failed", [])
        assert ask(address, "m", [3], 4, streams=streams) == (LOST, [])
    assert ask(address, "m", [1], 4, streams=True, leaves=True) == (CANCELLED, [5])


@pytest.mark.parametrize(("says", "how"), [([5, 6, 7, 8, 9], {RIGHT, CANCELLED}), ([5, 6, 7, 9, 9], {WRONG})])
def test_an_answer_with_another_token_is_counted_as_wrong(address, says, how, monkeypatch):
    monkeypatch.setattr("engrammar_lab.bench.load_clients.NUM_NEW", (4,))
    with Clients(f"http://{address}", "m", [Prompt([1], (says,))], number=2, pause=0.001) as clients:
        while len(clients.got) < 40:
            pass
    got = {one.how for one in clients.got}
    assert got >= {next(iter(how))} and got <= how | {CANCELLED}  # who goes away saw the first token only


def test_counts_are_those_of_what_clients_got():
    got = [Got(RIGHT, float(index), 4) for index in range(100)] + [Got(WRONG, 0.1, 4), Got("503 x", 0.1, 0)]
    counted = count(got, 10.0)
    assert counted["requests"] == 102 and counted[RIGHT] == 100 and counted[WRONG] == 1 and counted[CANCELLED] == 0
    assert counted["errors"] == {"503 x": 1}
    assert (counted["median_seconds"], counted["p99_seconds"]) == (50.0, 99.0)
    assert counted["tokens_per_second"] == 404 / 10


def test_a_file_is_mended_and_put_back(tmp_path):
    path = tmp_path / "rows.bin"
    whole = bytes(range(256)) * 512
    path.write_bytes(whole)
    damage(path)
    assert sum(one != two for one, two in zip(path.read_bytes(), whole)) == 4  # a bit in each eighth of 32 pages
    damage(path)
    assert path.read_bytes() == whole
    with path.open("rb") as opened, replaced(path):
        assert opened.read() == whole != path.read_bytes()
    assert path.read_bytes() == whole and [*tmp_path.iterdir()] == [path]


@pytest.mark.slow
def test_a_short_load_has_errors_where_something_is_broken_and_no_wrong_token(monkeypatch):
    monkeypatch.setattr(load, "CACHE_ROWS", "16")
    result = json.loads(json.dumps(measure(TINY)))
    about = result["about"]
    assert about["prompts"] and about["other_without_memory"] == about["prompts"] and about["other_with_patch"]
    assert result["servers"].keys() == {"disk", "RAM", *(["pool"] if why_no_pool() is None else [])}
    for name, phases in result["servers"].items():
        num_whole = {"disk": 3, "pool": 1, "RAM": 3}[name]  # phases before something is broken
        whole, broken = phases[:num_whole], phases[num_whole:]
        assert not any(phase["errors"] for phase in whole) and sum(phase[RIGHT] for phase in whole)
        if broken:
            assert any(phase["errors"] for phase in broken) and sum(phase[RIGHT] for phase in broken)
        for phase in phases:
            assert phase[WRONG] == phase["rows_missing_total"] == 0
            assert all("model_failed" in how for how in phase["errors"])
    assert result["servers"]["RAM"][1]["patch_changes_total"] >= 2
    header, lines = table(result)
    assert all(len(line) == len(header) for line in lines)
    assert "0 had a wrong token, and 0 rows were zeroed" in verdict(result)
    wrong = copy.deepcopy(result)
    wrong["servers"]["disk"][0][WRONG] = 2
    assert "2 had a wrong token" in verdict(wrong)
