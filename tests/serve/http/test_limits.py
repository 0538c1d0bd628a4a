"""Keys, sizes, hostile bodies, browsers elsewhere, the log, and what is refused before it reaches the engine."""

import json
import socket
import time

import pytest

from peerlm.serve.http.gates import SAFE_HEADERS

COMPLETE = {"model": "toy", "prompt": "lamp", "max_tokens": 2}


@pytest.fixture(scope="module")
def locked(start):
    return start(api_keys=("first", "second"), allow_origins=("https://a.example",))


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", ["first", "second", "admin"])
def test_each_key_opens(locked, key):
    assert locked.http.post("/v1/completions", json=COMPLETE, headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, bearer("third"), {"authorization": "Bearer"}, bearer("firs"), {"authorization": "first"}]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/metrics", "/tokenize", "/openapi.json", "/none"])
def test_nothing_opens_without_a_key(locked, headers, path):
    answer = locked.http.request("GET", path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_page_and_the_health_need_no_key(locked):
    for path in ("/", "/page/main.js", "/health"):
        assert locked.http.get(path).status_code == 200


def test_a_key_is_no_admin_token(locked):
    answer = locked.http.post(
        "/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "one"}, headers=bearer("first")
    )
    assert answer.status_code == 401


def test_without_an_admin_token_no_one_changes_packs(start):
    answer = start(admin_token=None).http.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "no_admin_token")


def test_sites_elsewhere_are_allowed_by_name_alone(locked, toy):
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    allowed = locked.http.options("/v1/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    other = locked.http.options("/v1/completions", headers=asked | {"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in toy.http.get("/health", headers=asked).headers


def test_a_form_of_another_site_is_not_read(toy):
    answer = toy.http.post("/v1/completions", content=json.dumps(COMPLETE), headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "content-type application/json" in answer.json()["error"]["message"]


def test_every_answer_has_the_safe_headers(toy):
    for path in ("/", "/health", "/none", "/v1/models"):
        headers = toy.http.get(path).headers
        assert {name: headers[name] for name in SAFE_HEADERS} == SAFE_HEADERS
        assert "server" not in headers


HOSTILE = {
    "nothing": b"",
    "no JSON": b"{",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"prompt":' * 50_000 + b"1" + b"}" * 50_000,
    "deep lists in a field": b'{"model":"toy","prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "NaN": b'{"model":"toy","prompt":"a","temperature":NaN}',
    "NaN where anything may stand": b'{"model":"toy","prompt":"a","metadata":{"a":NaN}}',
    "infinity": b'{"model":"toy","prompt":"a","temperature":Infinity}',
    "a number too large": b'{"model":"toy","prompt":"a","temperature":1e999}',
    "many digits": b'{"model":"toy","prompt":"a","seed":' + b"9" * 5000 + b"}",
    "digits without end": b'{"model":"toy","prompt":"a","max_tokens":' + b"9" * 4000 + b"}",
    "invalid UTF-8": b'{"model":"toy","prompt":"\xff\xfe"}',
    "half a character": b'{"model":"toy","prompt":"\\ud800"}',
    "half a character in a name": b'{"\\udfff":1}',
    "a null": b"null",
    "a list": b"[]",
    "a text": b'"prompt"',
    "a null byte": b'{"model":"toy\x00","prompt":"a"}',
    "wrong types": b'{"model":1,"prompt":{"a":1},"n":[],"stop":5,"logit_bias":[1]}',
    "a long name": b'{"model":"' + b"a" * 100_000 + b'","prompt":"a"}',
    "many unknown fields": json.dumps({f"f{i}": i for i in range(100_000)}).encode(),
    "many wrong tokens": b'{"model":"toy","prompt":[' + b'"",' * 500_000 + b"1]}",
    "many wrong messages": b'{"model":"toy","messages":[' + b'{"a":1},' * 200_000 + b"1]}",
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_400_in_few_words(toy, path, name):
    answer = toy.http.post(path, content=HOSTILE[name], headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text[:300]
    assert 0 < len(answer.json()["error"]["message"]) <= 500
    assert "Traceback" not in answer.text


def test_a_hostile_body_for_admins_is_400(toy):
    for content in HOSTILE.values():
        headers = bearer("admin") | {"content-type": "application/json"}
        assert toy.http.post("/v1/load_lora_adapter", content=content, headers=headers).status_code == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_is_413(toy, chunked):
    content = json.dumps({"model": "toy", "prompt": "a" * 10_000_000}).encode()
    parts = (content[start : start + 65536] for start in range(0, len(content), 65536))
    answer = toy.http.post(
        "/v1/completions", content=parts if chunked else content, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_body_that_does_not_come_is_408(start):
    slow = start(body_seconds=0.05)
    with socket.create_connection(slow.listener.getsockname(), timeout=5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        assert b" 408 " in connection.recv(4096).partition(b"\r\n")[0]


def test_paths_and_methods_that_are_not_there_are_errors_too(toy):
    assert toy.http.get("/none").json()["error"]["code"] == "no_such_path"
    answer = toy.http.get("/v1/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "wrong_method")
    assert toy.http.get("/page/secret").status_code == 404
    assert toy.http.get("/page/..%2fpage.py").status_code == 404


def test_the_log_has_counts_and_no_prompts(toy):
    toy.log.clear()
    toy.http.post("/v1/completions", json=COMPLETE | {"prompt": "the secret lamp"}, headers={"x-request-id": "mine"})
    deadline = time.monotonic() + 5
    while not toy.log and time.monotonic() < deadline:
        time.sleep(0.01)
    line = json.loads(toy.log[-1])
    assert "secret" not in toy.log[-1]
    expected = {"request": "mine", "path": "/v1/completions", "status": 200, "completion_tokens": 2, "model": "toy"}
    assert {name: line[name] for name in expected} == expected
    assert line["finishes"] == ["length"]
    assert 0 <= line["first_token_seconds"] <= line["seconds"]


def test_the_log_has_prompts_where_asked_for(start):
    open_log = start(log_prompts=True)
    text = open_log.http.post("/v1/completions", json=COMPLETE).json()["choices"][0]["text"]
    open_log.stop_listening()
    line = json.loads(open_log.log[-1])
    assert line["asked"] == {"prompt": "lamp"}
    assert line["texts"] == [text]
