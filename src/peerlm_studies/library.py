"""A library of hundreds of adapters on disk: are the right ones retrieved, what do they do, and what do they cost.

    python -m peerlm_studies.library runs/base prose.txt.xz encyclopedia.txt.xz code.txt.xz techdocs.txt.xz

Each document of some texts has an adapter. Its key is made from the document's beginning, and its end is what is asked
for: tokens that no key was made from, of a document that is known.
"""

import datetime
import json
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from peerlm.adapters.library import AdapterLibrary
from peerlm.adapters.library.lora_files import WEIGHTS_NAME
from peerlm.errors import UserError
from peerlm.evaluate.files import read_documents
from peerlm.evaluate.loading import load_model
from peerlm.evaluate.windows import begin_windows
from peerlm.layers.modes import evaluating
from peerlm.marks import marks_of
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.train.step import accumulate_gradients
from peerlm_studies.rows import append_row
from peerlm_studies.script import run_script

WINDOW = 128
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 8}


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document that has an adapter."""

    name: str
    domain: str
    known: Tensor
    """Its beginning, (tokens,)."""
    asked: Tensor
    """Windows from its last fifth, (windows, WINDOW)."""


def read_some(
    files: Sequence[Path],
    tokenizer: Any,
    number: int,
    *,
    known_tokens: int = 2048,
    windows: int = 4,
    start: Sequence[int] = (),
) -> list[Document]:
    """`number` documents, evenly from the files as far as they have long enough ones; `start` begins every window."""
    found: list[list[Document]] = []
    for file in files:
        domain = file.name.partition(".")[0]
        own: list[Document] = []
        for position, text in enumerate(read_documents(file, ())):
            if len(own) == number:
                break
            cut = len(text) * 4 // 5
            known, asked = (
                begin_windows(torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"]), WINDOW, start)
                for part in (text[: min(cut, 8 * known_tokens)], text[cut:][: 8 * WINDOW * windows])
            )
            known = known[:known_tokens]
            if len(known) < known_tokens or len(asked) < WINDOW * windows:
                continue
            ends = asked[: WINDOW * windows].view(windows, WINDOW)
            name = f"{domain}-{position:04d}"
            own.append(Document(name=name, domain=domain, known=known, asked=ends))
        found.append(own)
    chosen: list[Document] = []
    while len(chosen) < number and any(found):
        for own in found:
            if own and len(chosen) < number:
                chosen.append(own.pop(0))
    return chosen


def write_adapters(
    make: Callable[[], PreTrainedModel], documents: Sequence[Document], folder: Path, *, trained: int
) -> list[str]:
    """An adapter for each document: a few trained on what is known of it, spread over domains; the others random.

    Returns the names of the trained ones. Random ones have matrices B of a trained one's size, and harm a document that
    gets them by mistake.
    """
    domains = sorted({document.domain for document in documents})
    learned = [
        document
        for domain in domains
        for document in [d for d in documents if d.domain == domain][: max(1, trained // len(domains))]
    ]
    std = 0.0
    for document in learned:
        adapted: Any = get_peft_model(make(), LoraConfig(**LORA, target_modules="all-linear"))
        optimizer = RowAdamW(parameter_groups(adapted), lr=3e-3, weight_decay=0.0)
        windows = document.known.view(-1, WINDOW)
        adapted.train()
        for step in range(40):
            accumulate_gradients(adapted, windows[torch.arange(8) + 8 * step % len(windows)], micro_batch_size=8)
            optimizer.step()
        std = torch.cat([p.flatten() for n, p in adapted.named_parameters() if "lora_B" in n]).std().item()
        adapted.save_pretrained(folder / document.name)
    first = folder / learned[0].name
    tensors = load_file(first / WEIGHTS_NAME)
    generator = torch.Generator().manual_seed(0)
    for document in documents:
        target = folder / document.name
        if target.exists():
            continue
        target.mkdir()
        shutil.copyfile(first / "adapter_config.json", target / "adapter_config.json")
        random = {
            name: torch.randn(value.shape, generator=generator) * (std if "lora_B" in name else value.std())
            for name, value in tensors.items()
        }
        save_file(random, target / WEIGHTS_NAME)
    return [document.name for document in learned]


def measure_library(
    run: Path, files: Sequence[Path], folder: Path, output: Path, *, adapters: int, trained: int, layer: int
) -> dict[str, Any]:
    """Build a library, and append one row of what was measured.

    Args:
        run: a run or a saved model.
        files: texts, one of each domain; their names up to the first point are the domains'.
        folder: of the library; must not be there yet.
        output: JSON lines.
        adapters: documents that get one.
        trained: how many of them are trained; the others are random.
        layer: block that keys and queries come from.

    Raises:
        UserError: the folder is there already.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already; name a new folder for the library")
    base, tokenizer = load_model(run)
    documents = read_some(files, tokenizer, adapters, start=marks_of(base, tokenizer).window_start)
    folder.mkdir(parents=True)
    learned = write_adapters(lambda: load_model(run)[0], documents, folder, trained=trained)
    library = AdapterLibrary(base, folder, layer=layer, window=WINDOW, cache_bytes=64 * 2**20)
    started = time.perf_counter()
    for document in documents:
        library.add(folder / document.name, texts=[document.known])
    adding = (time.perf_counter() - started) / len(documents)
    row: dict[str, Any] = {
        "run": run.name,
        "adapters": len(documents),
        "trained": len(learned),
        "layer": layer,
        "seconds_per_added_adapter": adding,
        "adapter_bytes": sum(path.stat().st_size for path in folder.glob("*/" + WEIGHTS_NAME)) / len(documents),
        "key_bytes": library.keys.nbytes / len(library),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    row["accuracy"] = _accuracy(library, documents)
    row["held_out_share_right"] = library.fit_keys({document.name: [document.known] for document in documents})
    row["accuracy_fitted"] = _accuracy(library, documents)
    row["perplexity"] = _perplexities(library, [document for document in documents if document.name in learned])
    row |= _times(library, documents)
    row["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    append_row(output, row)
    return row


def _accuracy(library: AdapterLibrary, documents: Sequence[Document]) -> dict[str, dict[str, float]]:
    """By domain and over all: how often the right adapter is first, or among five, or the first is of its domain."""
    library.top_k = 5
    domain_of = {document.name: document.domain for document in documents}
    marks: dict[str, list[tuple[bool, bool, bool]]] = {}
    for document in documents:
        _, found = library.retrieve(document.asked)
        for names in found:
            mark = names[0] == document.name, document.name in names, domain_of[names[0]] == document.domain
            marks.setdefault(document.domain, []).append(mark)
            marks.setdefault("all", []).append(mark)
    kinds = ("first", "in_five", "domain")
    return {
        domain: {"adapters": float(sum(d.domain == domain or domain == "all" for d in documents))}
        | {kind: sum(column) / len(own) for kind, column in zip(kinds, zip(*own, strict=True), strict=True)}
        for domain, own in marks.items()
    }


def _perplexities(library: AdapterLibrary, documents: Sequence[Document]) -> dict[str, float]:
    """Of the ends of documents whose adapters were trained: the base, their own adapters, and what is retrieved."""
    model = library.model

    def perplexity(of: Callable[[Document], Any]) -> float:
        with evaluating(model):
            losses = [of(document) for document in documents]
        return torch.stack(losses).mean().exp().item()

    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    def own(document: Document) -> Tensor:
        with library.using({document.name: 1.0}):
            return loss(document.asked)

    found = {"base": perplexity(lambda document: loss(document.asked)), "own": perplexity(own)}
    for top_k in (1, 2, 4):
        library.top_k = top_k
        with library:
            found[f"retrieved, {top_k}"] = perplexity(lambda document: loss(document.asked))
    return found


@torch.no_grad()
def _times(library: AdapterLibrary, documents: Sequence[Document]) -> dict[str, float]:
    """Milliseconds per token of a batch of 8 prompts from 8 documents, and of one more token, the least of 5."""
    model, prompts = library.model, torch.stack([document.asked[0] for document in documents[:8]])
    library.top_k = 2

    def prompt() -> Any:
        return model(input_ids=prompts, use_cache=True).past_key_values

    def least(function: Callable[[], Any], tokens: int) -> float:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
        return 1000 * min(seconds) / tokens

    def decode() -> None:
        past = prompt()
        started = time.perf_counter()
        for _ in range(16):
            model(input_ids=prompts[:, -1:], past_key_values=past)
        decoding.append((time.perf_counter() - started) / 16 / len(prompts))

    found = {}
    for kind in ("plain", "library"):
        if kind == "library":
            library.attach()
            for name in library.names:
                library.cache.forget(name)
            library.cache.loads = 0
            started = time.perf_counter()
            others = torch.stack([document.asked[0] for document in documents[-64:]])
            for batch in others.split(8):
                model(input_ids=batch)
            found["ms_per_token_loading"] = 1000 * (time.perf_counter() - started) / others.numel()
            found["loads"] = library.cache.loads
        found[f"ms_per_prompt_token_{kind}"] = least(prompt, prompts.numel())
        decoding: list[float] = []
        for _ in range(5):
            decode()
        found[f"ms_per_decoded_token_{kind}"] = 1000 * min(decoding)
    library.detach()
    found["ms_per_sequence_retrieval"] = least(lambda: library.retrieve(prompts), len(prompts))
    hidden = torch.randn(8, WINDOW, library.keys.shape[1])
    found["ms_per_sequence_scores"] = least(lambda: library.retrieve(hidden), len(prompts))
    found["cache_bytes"] = library.cache.num_bytes
    return found


def main(
    run: Annotated[Path, typer.Argument(help="Run or saved model.")],
    files: Annotated[list[Path], typer.Argument(help="Texts, one of each domain.")],
    folder: Annotated[Path, typer.Option(help="Of the library, a new one.")] = Path("runs/library"),
    output: Annotated[Path, typer.Option(help="Rows, JSON lines.")] = Path("results/library.jsonl"),
    adapters: Annotated[int, typer.Option(help="Documents that get one.")] = 500,
    trained: Annotated[int, typer.Option(help="How many of them are trained.")] = 8,
    layer: Annotated[int, typer.Option(help="Block that keys come from.")] = 2,
) -> None:
    """Build a library, measure it, write a row and print it."""
    row = measure_library(run, files, folder, output, adapters=adapters, trained=trained, layer=layer)
    typer.echo(json.dumps(row, indent=2))


if __name__ == "__main__":
    run_script(main)
