"""Names of hosts, heads of requests that deceive or never end, and answers that nobody reads."""

import json
import re
import socket
import time

import pytest

from peerlm.cli import main
from peerlm.errors import UserError
from peerlm.serve.http.heads import is_loopback

COMPLETE = json.dumps({"model": "toy", "prompt": "lamp", "max_tokens": 2})


def exchange(running, content, *more):
    """What comes back until the server closes the connection."""
    with socket.create_connection(running.listener.getsockname(), timeout=5) as connection:
        for part in (content, *more):
            connection.sendall(part)
        found = b""
        while piece := connection.recv(65536):
            found += piece
    return found


def status(answer):
    return int(answer.split(b" ", 2)[1])


def error(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.fixture(scope="module")
def here(start):
    """A server that answers to this machine's names, and to one more."""
    return start(hosts=("127.0.0.1", "Model.Example"), body_seconds=0.3)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:8000",
        "127.8.9.1",
        "localhost",
        "LOCALHOST.:80",
        "a.localhost:1",
        "[::1]:8000",
        "[::1]",
        "model.example",
        "MODEL.example:443",
        "localhost:",
    ],
)
def test_a_server_answers_to_this_machines_names_and_to_given_ones(here, host):
    assert here.http.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "0.0.0.0",
        "10.0.0.1",
        "[::2]",
        "",
        "a:b",
        "model.example.evil",
        "[",
        ":",
    ],
)
@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/none"])
def test_a_server_does_not_answer_to_other_names(here, host, path):
    answer = here.http.get(path, headers={"host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (421, "wrong_host")
    assert "--allow-host" in answer.json()["error"]["message"]


def test_a_page_elsewhere_cannot_ask_by_its_own_name_even_with_the_token(here):
    headers = {"host": "evil.example", "authorization": "Bearer admin"}
    answer = here.http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "one"}, headers=headers)
    assert answer.status_code == 421
    assert not here.engine.loaded()


def test_old_clients_without_a_host_are_answered(here):
    assert status(exchange(here, b"GET /health HTTP/1.0\r\n\r\n")) == 200


def test_two_hosts_are_no_http(here):
    answer = exchange(here, b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n")
    assert (status(answer), error(answer)["code"]) == (400, "no_http")


def test_a_server_of_a_network_answers_to_any_name(toy):
    assert toy.http.get("/health", headers={"host": "any.example"}).status_code == 200


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (["--host", "127.0.0.1"], ("127.0.0.1",)),
        (["--host", "localhost", "--allow-host", "a.example"], ("localhost", "a.example")),
        (["--host", "0.0.0.0"], None),
        (["--host", "0.0.0.0", "--allow-host", "a.example"], ("0.0.0.0", "a.example")),
    ],
)
def test_the_command_guards_addresses_of_this_machine_alone(monkeypatch, tmp_path, options, allowed):
    seen = []

    class Engine:
        close = load = lambda self, *_: None

    monkeypatch.setattr("peerlm.serve.http.run.load_model", lambda path, **_: (None, None))
    monkeypatch.setattr("peerlm.serve.http.run.marks_of", lambda *_: None)
    monkeypatch.setattr("peerlm.serve.http.run.Engine", lambda *_, **__: Engine())

    def create_app(engine, texts, settings, log):
        seen.append(settings.hosts)
        raise UserError("enough was seen")

    monkeypatch.setattr("peerlm.serve.http.run.create_app", create_app)
    with pytest.raises(SystemExit, match="2"):
        main(["serve", str(tmp_path), "--port", "0", "--context", "8", *options])
    assert seen == [allowed]


@pytest.mark.parametrize("name", ["127.0.0.1", "::1", "[::1]", "localhost", "a.localhost"])
def test_loopback(name):
    assert is_loopback(name)
    assert not is_loopback(f"{name}.a")


SMUGGLED = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "lengths",
    [
        "content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        f"transfer-encoding: chunked\r\ncontent-length: {len(SMUGGLED) + 5}\r\n\r\n0\r\n\r\n",
        "content-length: 5\r\ncontent-length: 6\r\n\r\n0\r\n\r\n",
        "content-length: +5\r\n\r\n0\r\n\r\n",
        "transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n",
        "transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        "transfer-encoding: chunked\r\n\r\n0x5\r\nabcde\r\n0\r\n\r\n",
        "transfer-encoding: chunked\r\n\r\n-1\r\n\r\n",
    ],
)
def test_a_body_with_two_lengths_or_none_is_400_and_nothing_behind_it_is_read(here, lengths):
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{lengths}".encode()
    answer = exchange(here, head + SMUGGLED)
    assert len(re.findall(rb"HTTP/1\.1 \d", answer)) == 1
    assert (status(answer), error(answer)["code"] in ("two_lengths", "no_http")) == (400, True), answer
    assert b"connection: close" in answer


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nhost: localhost\r\na: " + b"a" * 66_000,
        b"GET /" + b"a" * 66_000,
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 11_000,
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\na\x00: b\r\n\r\n",
        b"GET /health\x00 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
    ],
)
def test_a_head_that_is_no_http_or_too_long_is_400(here, head):
    answer = exchange(here, head)
    assert (status(answer), error(answer)["code"]) == (400, "no_http")


@pytest.mark.parametrize(
    "path", ["/%00", "/page/%00", "/page/..%00", "/v1/models/%00", "/v1/models/..%2f", "/%ff", "//"]
)
def test_strange_paths_are_404(here, path):
    answer = exchange(here, f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    assert (status(answer), bool(error(answer)["message"])) == (404, True)


def test_bad_http_behind_an_answer_closes_and_leaves_no_traceback(here, caplog):
    with socket.create_connection(here.listener.getsockname(), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/load_lora_adapter HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        answer = b""
        while not answer.endswith(b"}}"):
            answer += connection.recv(65536)
        assert b" 401 " in answer
        connection.sendall(b"no length\r\n")
        assert connection.recv(65536) == b""
    assert not [record for record in caplog.records if record.exc_info]


def test_a_connection_without_a_request_is_closed(here):
    with socket.create_connection(here.listener.getsockname(), timeout=5) as connection:
        assert connection.recv(1) == b""


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"])
def test_a_head_that_trickles_in_does_not_keep_a_connection(here, before):
    with socket.create_connection(here.listener.getsockname(), timeout=5) as connection:
        connection.sendall(before + b"GET /health HTTP/1.1\r\n")
        deadline = time.monotonic() + 5
        while _takes(connection, b"a: b\r\n"):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _takes(connection, content):
    try:
        connection.sendall(content)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def test_requests_that_take_long_are_not_cut(start):
    slow = start(body_seconds=0.05, engine_pace=0.02)
    answer = slow.post("/v1/completions", prompt="lamp", max_tokens=20)
    assert answer.json()["usage"]["completion_tokens"] == 20


def test_an_answer_that_nobody_reads_is_given_up(start):
    running = start(deadline_seconds=0.3)
    running.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = json.dumps(
        {"model": "toy", "prompt": ["lamp"] * 8, "n": 4, "max_tokens": 50, "logprobs": 20, "stream": True}
    )
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(running.listener.getsockname())
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        deadline = time.monotonic() + 5
        while len(running.server.server_state.connections) or not running.engine.requests:
            assert time.monotonic() < deadline
            time.sleep(0.01)
