"""A thousand clients at once against `peerlm serve`: answers, streams, cancels, disconnects, malformed bodies, packs.

Every client knows what its greedy text must be, as the idle server wrote it before. An answer is its own text or a
documented error; anything else is a fault, and the exit code is 1. Packs are loaded and unloaded meanwhile, memory is
watched, and at the end SIGTERM must let the server end with code 0.

    python benchmarks/serve_load.py [--seconds 600] [--clients 1000] [--kill] [--folder FOLDER] [--json FILE]

With --kill the server gets SIGKILL at half time, and is started again on its port by the same command. What clients had
sent by then may be lost; afterwards they must get their own texts again. No file may be left behind, the packs of the
command must be there, and a pack that was loaded over HTTP alone must not.

Without --folder it serves a small random model, so that the server, not the arithmetic, is what is tested. Latencies
are of clients that never pause: with more clients than slots they are times in a queue.
"""

# ruff: noqa: T201, a report on the terminal is what this is for

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXT = "The old keeper climbed the stairs and lit the lamp. Nobody answered the door, so the keeper went home. "
TOKEN = "load-test"
PACKS = ("one", "two")
MALFORMED = (
    b"{",
    b'{"model": "load", "prompt": NaN}',
    b"[" * 10_000,
    b'{"model": "load", "prompt": "\xff"}',
    b'{"model": "load", "prompt": 5}',
    b'{"model": "load", "prompt": "a", "temperature": -1}',
    b'{"model": "load", "prompt": "a", "made_up": 1}',
    b'{"model": "load", "prompt": "a", "n": 100000}',
)
DOCUMENTED = {429: "queue full", 503: "stopping"}
KINDS = {"whole": 40, "stream": 30, "cancel": 10, "disconnect": 8, "malformed": 6, "pack": 6}
"""What a client does next, and how often."""


def small_model(folder: Path) -> None:
    """Save a small random model, its tokenizer and packs."""
    import torch

    from peerlm.data.tokenizer import train_tokenizer
    from peerlm.model import PeerConfig, PeerForCausalLM
    from peerlm.packs import new_pack, pack_parameters, save_pack, unload_pack

    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT * 3], vocab_size=320)
    experts = {"num_experts": 64, "heads": 2, "experts_per_head": 4, "key_dim": 8}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
    config = PeerConfig(vocab_size=len(tokenizer), ffw_layers=["dense", "peer"], peer=experts, **sizes)
    model = PeerForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(8)
        model.model.norm.weight.uniform_(0.5, 2)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    for name in PACKS:
        new_pack(model, name, 16)
        with torch.no_grad():
            for parameter in pack_parameters(model, name):
                parameter.normal_(std=2.0)
        save_pack(model, name, folder / "packs" / name)
        unload_pack(model, name)


@dataclass
class Answer:
    """What came back."""

    status: int = 0
    text: str = ""
    finish: str | None = None
    first_seconds: float | None = None
    seconds: float = 0.0


@dataclass
class Results:
    """What all clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    faults: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)

    def fault(self, what: str) -> None:
        """Note what must not happen."""
        self.counts["fault"] += 1
        if len(self.faults) < 20:
            self.faults.append(what)


class Server:
    """The process that is tested, which may be killed and started again."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.files = folder / "temporary"
        self.files.mkdir()
        self.command = [sys.executable, "-m", "peerlm", "serve", str(folder / "model"), "--name", "load"]
        self.command += ["--slots", str(options.slots), "--queue", str(options.queue), "--no-log"]
        self.command += ["--pack-folder", str(folder / "packs"), "--admin-token", TOKEN]
        for name in PACKS:
            self.command += ["--pack", f"{name}={folder / 'packs' / name}"]
        self.port = 0
        self.killed = self.back = float("inf")
        self.start()

    def start(self) -> None:
        """Start it, and wait until it listens; on the port that it had, if it had one."""
        environment = os.environ | {"TMPDIR": str(self.files)}
        command = [*self.command, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().split()[3].rpartition(":")[2])

    def kill(self) -> None:
        """SIGKILL."""
        self.killed = time.monotonic()
        self.process.kill()
        self.process.wait()

    def was_down(self, since: float) -> bool:
        """Whether it was killed after a time, or had not come back by then."""
        return self.killed <= time.monotonic() and since <= self.back

    def models(self) -> list[str]:
        """The names that it lists."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models") as answer:
            return [model["id"] for model in json.load(answer)["data"]]


class Client:
    """Requests over connections of their own, with nothing between them and the bytes."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    async def post(self, path: str, body: bytes, *, read: float = float("inf"), admin: bool = False) -> Answer:
        """Send a body; read so many pieces of the answer at the most."""
        started = time.monotonic()
        answer = Answer()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            key = f"authorization: Bearer {TOKEN}\r\n" if admin else ""
            head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json"
            writer.write(f"{head}\r\n{key}content-length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
            content, pieces = b"", 0
            while pieces < read and (piece := await reader.read(65536)):
                content += piece
                pieces += 1
                if answer.first_seconds is None and b"\r\n\r\n" in content and content.count(b"data: "):
                    answer.first_seconds = time.monotonic() - started
            answer.seconds = time.monotonic() - started
            if read == float("inf"):
                self._fill(answer, content)
        finally:
            writer.close()
        return answer

    @staticmethod
    def _fill(answer: Answer, content: bytes) -> None:
        head, _, rest = content.partition(b"\r\n\r\n")
        answer.status = int(head.split(b" ", 2)[1])
        if b"chunked" in head.lower():
            rest = _unchunked(rest)
        if b"text/event-stream" in head:
            events = [line.removeprefix("data: ") for line in rest.decode().split("\n\n") if line]
            if not events or events[-1] != "[DONE]":
                raise ValueError(f"a stream without its end: {rest[-200:]!r}")
            for event in map(json.loads, events[:-1]):
                if "error" in event:
                    answer.status = 503 if event["error"]["code"] == "stopping" else 500
                    return
                for choice in event["choices"]:
                    answer.text += choice["text"]
                    answer.finish = choice["finish_reason"] or answer.finish
        elif answer.status == 200 and rest.startswith(b"{"):
            choice = json.loads(rest)["choices"][0]
            answer.text, answer.finish = choice["text"], choice["finish_reason"]
        elif answer.status != 200:
            json.loads(rest)["error"]["message"]  # every error has one


def _unchunked(content: bytes) -> bytes:
    parts = []
    while content:
        size, _, content = content.partition(b"\r\n")
        length = int(size, 16)
        parts.append(content[:length])
        content = content[length + 2 :]
    return b"".join(parts)


def request(case: tuple[str, str, int], stream: bool = False) -> bytes:
    """The body for a case: model, prompt, tokens."""
    model, prompt, tokens = case
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}
    return json.dumps(body).encode()


async def one_client(
    client: Client,
    server: Server,
    number: int,
    until: float,
    expected: dict[tuple[str, str, int], str],
    results: Results,
) -> None:
    """One of the thousand: asks again and again until the time is over."""
    draw = random.Random(number)
    while time.monotonic() < until:
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        of_packs = [case for case in expected if (":" in case[0]) == (kind == "pack")]
        case = draw.choice(of_packs)
        started = time.monotonic()
        try:
            if kind == "malformed":
                answer = await client.post("/v1/completions", draw.choice(MALFORMED))
                results.counts[f"malformed {answer.status}"] += 1
                if answer.status != 400:
                    results.fault(f"a malformed body got {answer.status}")
            elif kind in ("cancel", "disconnect"):
                read = draw.randint(1, 4) if kind == "cancel" else 0
                await client.post("/v1/completions", request(case, stream=draw.random() < 0.7), read=read)
                results.counts[kind] += 1
            else:
                answer = await client.post("/v1/completions", request(case, stream=kind == "stream"))
                judge(kind, case, answer, expected[case], results)
                if answer.status in DOCUMENTED:
                    await asyncio.sleep(1 + draw.random())
        except (OSError, ValueError, KeyError, IndexError, asyncio.IncompleteReadError) as error:
            if server.was_down(started):
                results.counts["lost by the kill"] += 1
            else:
                results.fault(f"{kind}: {type(error).__name__}: {error}")
            await asyncio.sleep(0.1 + draw.random())


def judge(kind: str, case: tuple[str, str, int], answer: Answer, expected: str, results: Results) -> None:
    """Whether an answer is the client's own, or a documented error."""
    if answer.status == 200:
        results.counts[f"{kind} 200"] += 1
        results.seconds.append(answer.seconds)
        results.tokens += case[2]
        if kind == "stream" and answer.first_seconds is not None:
            results.first_seconds.append(answer.first_seconds)
        if answer.text != expected:
            results.fault(f"{case} got {answer.text!r} in place of {expected!r}")
    elif answer.status in DOCUMENTED or (answer.status == 404 and kind == "pack"):
        results.counts[f"{kind} {answer.status}"] += 1
    else:
        results.fault(f"{kind} {case} got {answer.status}")


async def change_packs(client: Client, server: Server, until: float, results: Results) -> None:
    """Load and unload packs while others use them."""
    draw = random.Random(0)
    while time.monotonic() < until:
        name = draw.choice(PACKS)
        for action, body in (("unload", {"lora_name": name}), ("load", {"lora_name": name, "lora_path": name})):
            started = time.monotonic()
            try:
                answer = await client.post(f"/v1/{action}_lora_adapter", json.dumps(body).encode(), admin=True)
            except (OSError, ValueError, IndexError) as error:
                if not server.was_down(started):
                    results.fault(f"{action}: {error}")
                await asyncio.sleep(0.5)
                continue
            results.counts[f"{action} {answer.status}"] += 1
            if answer.status not in (200, 409) and not (action == "load" and answer.status == 400):
                results.fault(f"{action} got {answer.status}")
            await asyncio.sleep(0.5)


async def watch_memory(server: Server, until: float, results: Results) -> None:
    """The server's resident memory, every two seconds."""
    while time.monotonic() < until:
        if not server.killed <= time.monotonic() < server.back:
            for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    results.memory_mib.append(int(line.split()[1]) / 1024)
        await asyncio.sleep(2)


async def expectations(client: Client) -> dict[tuple[str, str, int], str]:
    """What an idle server writes for each case, one at a time."""
    prompts = [TEXT[start : start + 12] for start in range(0, 60, 6)]
    cases = [("load", prompt, tokens) for prompt in prompts for tokens in (4, 12, 24)]
    cases += [(f"load:{pack}", prompt, 8) for pack in (*PACKS, "+".join(PACKS)) for prompt in prompts[:4]]
    found = {}
    for case in cases:
        answer = await client.post("/v1/completions", request(case))
        assert answer.status == 200, (case, answer)
        found[case] = answer.text
    assert len(set(found.values())) > len(found) // 2, "the model writes nearly the same for all prompts"
    return found


async def kill_and_restart(client: Client, server: Server, seconds: float, results: Results) -> None:
    """SIGKILL after some seconds, in the middle of everything, and a start by the same command."""
    await asyncio.sleep(seconds)
    body = json.dumps({"lora_name": "by-http", "lora_path": PACKS[0]}).encode()
    answer = await client.post("/v1/load_lora_adapter", body, admin=True)
    if answer.status != 200 or "load:by-http" not in await asyncio.to_thread(server.models):
        results.fault(f"a pack could not be loaded before the kill: {answer.status}")
    server.kill()
    left = sorted(path.name for path in server.files.iterdir())
    if left:
        results.fault(f"the killed server has left {left}")
    await asyncio.to_thread(server.start)
    server.back = time.monotonic()
    results.counts["seconds until it was back"] = round(server.back - server.killed)
    names = await asyncio.to_thread(server.models)
    if "load" not in names or "load:by-http" in names:
        results.fault("the pack that was loaded over HTTP came back, or the model did not")


async def load(options: argparse.Namespace, server: Server) -> Results:
    """All clients, for the asked time."""
    client, results = Client("127.0.0.1", server.port), Results()
    expected = await expectations(client)
    until = time.monotonic() + options.seconds
    work = [one_client(client, server, number, until, expected, results) for number in range(options.clients)]
    work += [change_packs(client, server, until, results), watch_memory(server, until, results)]
    if options.kill:
        work.append(kill_and_restart(client, server, options.seconds / 2, results))
    await asyncio.gather(*work)
    return results


def quantile(values: list[float], share: float) -> float | None:
    """A value that this share is below; None without any."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else None


def summary(results: Results, options: argparse.Namespace, exit_code: int) -> dict[str, Any]:
    """What is reported."""
    third = max(len(results.memory_mib) // 3, 1)
    return {
        "clients": options.clients,
        "killed": options.kill,
        "seconds": options.seconds,
        "cores": os.cpu_count(),
        "counts": dict(sorted(results.counts.items())),
        "tokens_per_second": round(results.tokens / options.seconds, 1),
        "answer_seconds": {f"p{share:.0%}"[:-1]: quantile(results.seconds, share) for share in (0.5, 0.99)},
        "first_token_seconds": {f"p{share:.0%}"[:-1]: quantile(results.first_seconds, share) for share in (0.5, 0.99)},
        "memory_mib": {
            "first third, most": max(results.memory_mib[:third], default=None),
            "last third, most": max(results.memory_mib[-third:], default=None),
        },
        "exit_code": exit_code,
        "faults": results.faults,
    }


def main() -> None:
    """Start a server, ask, stop it, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--queue", type=int, default=1024)
    parser.add_argument("--kill", action="store_true", help="SIGKILL at half time, and a start on the same port")
    parser.add_argument("--folder", type=Path, help="has model/ and packs/one, packs/two; default: a small random one")
    parser.add_argument("--json", type=Path, help="file that the report is added to, one line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if options.folder is None:
            small_model(folder)
        server = Server(options, folder)
        try:
            results = asyncio.run(load(options, server))
            server.process.send_signal(signal.SIGTERM)
            exit_code = server.process.wait(timeout=120)
        finally:
            server.process.kill()
    report = summary(results, options, exit_code)
    print(json.dumps(report, indent=2))
    if options.json is not None:
        with options.json.open("a") as file:
            file.write(json.dumps(report) + "\n")
    sys.exit(1 if results.counts["fault"] or exit_code else 0)


if __name__ == "__main__":
    main()
