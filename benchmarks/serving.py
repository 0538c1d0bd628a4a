"""The serving engine: many streams against one, the first token under load, packs that come and go, PEER against dense.

Without folders, the models are those of `language_model.py` with random weights: PEER, and dense layers of equal FLOPs.
With --equal-perplexity they are two of docs/results.md that came to the same perplexity on held-out text, with random
weights: PEER of width 48 (58.5) and dense of width 128 (59.5); ratios are then to dense. Texts are checked against
`generate` before anything is timed. The machine has to be idle. Markdown and JSON.

    python benchmarks/serving.py [--model FOLDER --baseline FOLDER] [--streams 32] [--parts ...] [--json FILE]
    python benchmarks/serving.py --equal-perplexity --parts generate alone [--threads 1] [--rounds 21] [--json FILE]
"""

# ruff: noqa: T201, tables on the terminal are what this is for

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from language_model import VOCABULARY, decoding, model_of, neurons_of_equal_flops, peer_settings
from measure import interleave, report
from transformers import PreTrainedModel

from peerlm import PEER, DenseFFW, PeerConfig, PeerForCausalLM
from peerlm.evaluate.loading import load_model
from peerlm.malloc import keep_freed_memory
from peerlm.packs.api import new_pack, save_pack, unload_pack
from peerlm.serve import Engine, Handle, Request, SamplingParams

PARTS = ("throughput", "first-token", "packs", "prefix", "alone", "generate")
EQUAL_PERPLEXITY: dict[str, dict[str, Any]] = {
    "dense, width 128": {"hidden_size": 128, "ffw_layers": "dense"},
    "PEER, width 48": {
        "hidden_size": 48,
        "ffw_layers": "peer:inner",
        "peer": {
            "num_experts": 256**2,
            "heads": 1,
            "experts_per_head": 64,
            "key_dim": 32,
            "shared_keys": False,
            "weight_scale": 256.0,
            "activation": "one_plus",
            "query_norm": "batch",
            "key_norm": True,
        },
    },
}
"""Of docs/results.md, models of a budget's best size: dense at 6.32e13 FLOPs, PEER at 2e13."""


class Numbers:
    """A tokenizer that writes numbers, for models with random weights."""

    eos_token_id = None

    def decode(self, ids: list[int], **options: Any) -> str:
        """Each id and a space."""
        return "".join(f"{token} " for token in ids)


def models(options: argparse.Namespace) -> dict[str, tuple[PreTrainedModel, Any]]:
    """The model and the baseline, and their tokenizers."""
    if options.model:
        folders = {"model": options.model} | ({"baseline": options.baseline} if options.baseline else {})
        return {name: load_model(folder) for name, folder in folders.items()}
    torch.manual_seed(0)
    if options.equal_perplexity:
        shape = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "num_attention_heads": 4}
        return {
            name: (PeerForCausalLM(PeerConfig(max_position_embeddings=256, **shape, **each)).eval(), Numbers())
            for name, each in EQUAL_PERPLEXITY.items()
        }
    settings = peer_settings(options)
    hidden = neurons_of_equal_flops(options.dim, settings)
    built = {
        "PEER": model_of(options.dim, lambda: PEER(options.dim, **settings), settings),
        "dense": model_of(options.dim, lambda: DenseFFW(options.dim, hidden=hidden), settings),
    }
    return {name: (model.eval(), Numbers()) for name, model in built.items()}


def prompt(length: int, seed: int, vocabulary: int = VOCABULARY) -> tuple[int, ...]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(10, vocabulary, (length,), generator=generator).tolist())


def request(tokens: int, ids: tuple[int, ...], packs: tuple[str, ...] = ()) -> Request:
    """A request of likeliest tokens that ends by its length alone."""
    return Request(prompt=ids, packs=packs, sampling=SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))


def read(handle: Handle) -> int:
    """Wait for all tokens of a request; how many there were."""
    events = list(handle)
    if events[-1].finish_reason != "length":
        raise SystemExit(f"a request ended with {events[-1].finish_reason}: {events[-1].error}")
    return sum(event.token_id is not None for event in events)


def check(model: PreTrainedModel, engine: Engine) -> None:
    """Compare eight texts, written together, with those of `generate`."""
    prompts = [prompt(4 + 5 * seed, seed, engine.vocab_size) for seed in range(8)]
    handles = [engine.submit(request(16, ids)) for ids in prompts]
    found = [[event.token_id for event in handle] for handle in handles]
    same = 0
    for ids, tokens in zip(prompts, found, strict=True):
        with torch.no_grad():
            whole = model.generate(torch.tensor([ids]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
        same += whole[0, len(ids) :].tolist() == tokens
    print(f"{same} of 8 texts are those of generate")
    if same < 8 and model.dtype == torch.float32:
        raise SystemExit("the engine writes other tokens than generate; nothing was timed")


@contextmanager
def load(engine: Engine, streams: int, gaps: list[float]) -> Iterator[None]:
    """Keep streams running, which add the milliseconds between their tokens to `gaps`."""
    stop = threading.Event()

    def stream(seed: int) -> None:
        while not stop.is_set():
            handle = engine.submit(request(engine.context - 64, prompt(32, seed, engine.vocab_size)))
            last = None
            for _ in handle:
                now = time.perf_counter()
                if last is not None:
                    gaps.append(1e3 * (now - last))
                last = now
                if stop.is_set():
                    handle.cancel()

    threads = [threading.Thread(target=stream, args=(seed,)) for seed in range(streams)]
    for thread in threads:
        thread.start()
    while engine.stats().running < streams:
        time.sleep(0.01)
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def throughput(engine: Engine, options: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of one stream at a time, and of many together."""
    tokens = options.tokens

    def many(count: int) -> Callable[[], int]:
        def run() -> int:
            handles = [engine.submit(request(tokens, prompt(32, seed, engine.vocab_size))) for seed in range(count)]
            return sum(map(read, handles))

        return run

    times = interleave(
        {"one at a time": many(1), f"{options.streams} streams": many(options.streams)}, rounds=options.rounds
    )
    counts = {"one at a time": 1, f"{options.streams} streams": options.streams}
    return {name: [1e3 * counts[name] * tokens / each for each in values] for name, values in times.items()}


def first_token(engine: Engine, options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds to the first token of a prompt of 128 tokens, alone and while all slots but one write."""

    def once(seed: int) -> float:
        started = time.perf_counter()
        handle = engine.submit(request(2, prompt(128, 1000 + seed, engine.vocab_size)))
        next(handle)
        spent = 1e3 * (time.perf_counter() - started)
        read(handle)
        return spent

    quiet = [once(seed) for seed in range(8)]
    with load(engine, options.streams - 1, []):
        loaded = [once(100 + seed) for seed in range(16)]
    return {"first token, alone": quiet, f"first token, {options.streams - 1} streams": loaded}


def packs(model: PreTrainedModel, engine: Engine, options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds between tokens of running streams without and while ten packs are loaded, used and unloaded."""
    ids = torch.tensor([prompt(64, 5, engine.vocab_size)])
    with tempfile.TemporaryDirectory() as folder:
        for place in range(10):
            new_pack(model, f"pack{place}", 256, seed=place)
            save_pack(model, f"pack{place}", Path(folder, f"pack{place}"))
            unload_pack(model, f"pack{place}")
        with torch.no_grad():
            before = model(ids).logits
        quiet: list[float] = []
        with load(engine, options.streams // 2, quiet):
            time.sleep(options.seconds)
        busy: list[float] = []
        loads, unloads = [], []
        with load(engine, options.streams // 2, busy):
            for place in range(10):
                name = f"pack{place}"
                started = time.perf_counter()
                engine.load(name, Path(folder, name))
                loads.append(1e3 * (time.perf_counter() - started))
                read(engine.submit(request(8, prompt(16, place, engine.vocab_size), (name,))))
            for place in range(10):
                started = time.perf_counter()
                engine.unload(f"pack{place}")
                unloads.append(1e3 * (time.perf_counter() - started))
        with torch.no_grad():
            if not torch.equal(model(ids).logits, before):
                raise SystemExit("unloading did not restore the bits")
    return {"between tokens": quiet, "between tokens, packs": busy, "load a pack": loads, "unload a pack": unloads}


def prefix(engine: Engine, options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds to the first token of a prompt of 128 tokens, read for the first time and known but for the last."""
    found: dict[str, list[float]] = {"prompt read": [], "prompt known": []}
    for seed in range(8):
        ids = prompt(128, 2000 + seed, engine.vocab_size)
        for name, last in (("prompt read", 11), ("prompt known", 12)):
            started = time.perf_counter()
            handle = engine.submit(request(2, (*ids, last)))
            next(handle)
            found[name].append(1e3 * (time.perf_counter() - started))
            read(handle)
    return found


def per_second(cases: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of each case, run in turn."""
    times = interleave(cases, rounds=options.rounds)
    return {name: [1e3 * options.tokens / each for each in values] for name, values in times.items()}


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; its text is compared with that of --baseline")
    parser.add_argument("--baseline", type=Path, help="a folder, as of a dense model of equal perplexity")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="that each stream writes")
    parser.add_argument("--seconds", type=float, default=5.0, help="of load without packs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--num-experts", type=int, default=1024**2)
    parser.add_argument("--experts-per-head", type=int, default=16)
    parser.add_argument("--row-format", default="float32")
    parser.add_argument("--equal-perplexity", action="store_true", help="PEER and dense of equal perplexity")
    parser.add_argument("--threads", type=int, help="of PyTorch and the kernels")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    made = models(options)
    engines = {
        name: Engine(model, tokenizer, slots=options.streams, prefix_bytes=2**28 if "prefix" in options.parts else 0)
        for name, (model, tokenizer) in made.items()
    }
    sizes = {"streams": options.streams, "tokens": options.tokens}
    for name, (model, _) in made.items():
        engine = engines[name]
        size = {**sizes, "model": name, "parameters": sum(each.numel() for each in model.parameters())}
        print(f"\n{name}: {size['parameters']:,} parameters; {engine.description}")
        check(model, engine)
        print("| part | contender | median | lowest .. highest | ratio |\n|---|---|---|---|---|")
        if "throughput" in options.parts:
            report("tokens/s", throughput(engine, options), size, options.json)
        if "first-token" in options.parts:
            report("ms", first_token(engine, options), size, options.json)
        if "prefix" in options.parts:
            report("ms", prefix(engine, options), size, options.json)
        if "packs" in options.parts and any(isinstance(module, PEER) for module in model.modules()):
            figures = packs(model, engine, options)
            report("ms", figures, size, options.json)
            worst = {each: statistics.quantiles(figures[each], n=100)[98] for each in list(figures)[:2]}
            print("99 of 100 gaps are shorter than " + ", ".join(f"{ms:.1f} ms ({each})" for each, ms in worst.items()))
    print()
    if "alone" in options.parts and len(engines) > 1:
        cases: dict[str, Callable[[], object]] = {
            name: lambda engine=engine: read(engine.submit(request(options.tokens, prompt(32, 1, engine.vocab_size))))
            for name, engine in engines.items()
        }
        report("tokens/s, batch 1", per_second(cases, options), sizes, options.json)
    if "generate" in options.parts:
        cases = {name: decoding(model, options.tokens) for name, (model, _) in made.items()}
        report("tokens/s, generate, batch 1", per_second(cases, options), sizes, options.json)
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
