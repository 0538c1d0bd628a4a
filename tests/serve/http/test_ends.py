"""Clients that leave, and servers that stop."""

import json
import socket
import threading
import time

import httpx2
import openai
import pytest

LONG = {"model": "toy", "prompt": "lamp", "max_tokens": 60}


def send(running, body):
    """A connection that has sent a request."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(running.listener.getsockname(), timeout=5)
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
    connection.sendall(f"{head}\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_sequences(start, stream):
    slow = start(engine_pace=0.02)
    connection = send(slow, LONG | {"stream": stream, "n": 2})
    wait_for(lambda: slow.engine.stats().running == 2)
    connection.close()
    assert slow.engine.drain(5)
    assert slow.engine.finished == {"cancelled": 2}


def test_a_stream_that_is_closed_ends_its_sequence(start):
    slow = start(engine_pace=0.02)
    with slow.openai.completions.create(**LONG, stream=True) as stream:
        next(iter(stream))
    assert slow.engine.drain(5)
    assert slow.engine.finished == {"cancelled": 1}


def test_a_stop_lets_running_requests_end_and_refuses_new_ones(start):
    slow = start(engine_pace=0.01)
    texts = []
    stream = slow.openai.completions.create(**LONG, stream=True)
    next(iter(stream))
    slow.server.stop()
    wait_for(lambda: slow.app.state.served.draining)
    with pytest.raises(openai.InternalServerError, match="the server stops") as caught:
        slow.openai.completions.create(**LONG)
    assert caught.value.status_code == 503
    assert httpx2.get(f"{slow.url}/health").status_code == 503
    texts = [chunk.choices[0].finish_reason for chunk in stream]
    assert texts[-1] == "length"
    assert len(texts) > 30
    wait_for(lambda: not slow.is_alive)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{slow.url}/health")


def test_a_stop_while_a_request_is_read_is_503(start, monkeypatch):
    running = start()
    submit = running.engine.submit

    def too_late(request):
        running.app.state.served.draining = True
        running.engine.drain(0)
        return submit(request)

    monkeypatch.setattr(running.engine, "submit", too_late)
    answer = running.post("/v1/completions", prompt="lamp")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


def test_a_second_stop_ends_at_once(start):
    slow = start(engine_pace=0.05)
    failed = []

    def ask():
        try:
            slow.openai.completions.create(**LONG)
        except openai.APIError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: slow.engine.stats().running)
    slow.server.stop()
    slow.server.stop()
    wait_for(lambda: not slow.is_alive)
    thread.join(5)
    assert len(failed) == 1
    assert slow.engine.stats().running == 0
