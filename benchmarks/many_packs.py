"""Many packs beside one pretrained model: each alone, two at once, all at once, on each one's text and on mixed text.

Of each text the first tokens are taught, a pack of its own each, and those after them are held out. Packs do not know
of each other. A row for each text, and one for mixed text, in the way of `teach.py`.

    python benchmarks/many_packs.py MODEL --text code.txt law.txt ... --background book.txt --output runs/many
        --json FILE
"""

# ruff: noqa: T201, tables on the terminal are what this is for

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from teach import add_row, has_row, rows_of, setting, write_text
from torch import Tensor, nn
from transformers import PreTrainedModel

from peerlm.cli.stage_options import learn_config
from peerlm.continual import LearnConfig, learn, markdown_matrix
from peerlm.evaluate import held_out_loss, load_model
from peerlm.evaluate.windows import text_windows
from peerlm.malloc import keep_freed_memory
from peerlm.packs.api import choose_packs, load_pack, unload_pack
from peerlm.packs.opening import openings
from peerlm.train.precision import has_bf16_products

SEGMENT = 64
"""Tokens of one text that follow each other in mixed text."""


def cut(file: Path, taught: Path, held_out: Path, tokens: Sequence[int]) -> None:
    """Write the beginning of a text, about so many tokens, and what follows; of 4 characters each."""
    with file.open(encoding="utf-8") as text:
        for path, count in zip((taught, held_out), tokens, strict=True):
            write_text(path, text.read(4 * count))


def mixed(windows: Sequence[Tensor]) -> Tensor:
    """Sequences of texts by turns, `SEGMENT` tokens each: (texts, context); segment s of row r is of text r + s."""
    segments = [text[0].split(SEGMENT) for text in windows]
    many = len(segments)
    return torch.stack(
        [torch.cat([segments[(row + s) % many][s] for s in range(len(segments[0]))]) for row in range(many)]
    )


def loss(model: nn.Module, windows: Tensor, packs: Sequence[str]) -> float:
    """Nats per token with these packs alone."""
    with choose_packs(model, [list(packs)]):
        return round(held_out_loss(model, windows, batch_size=4), 5)


def opened(model: nn.Module, windows: Tensor, names: Sequence[str]) -> Tensor:
    """Of each pack the share of gates that open at each token, all loaded: (packs, windows, context)."""
    parts = [openings(model, batch) for batch in windows.split(4)]
    return torch.stack([torch.cat([part[name] for part in parts]) for name in names])


def text_rows(model: PreTrainedModel, held_out: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Of each text the loss with no pack, with its own, with its own and the next one's, with all; where gates open."""
    names, rows = list(held_out), []
    for number, (name, windows) in enumerate(held_out.items()):
        after = names[(number + 1) % len(names)]
        own_open = opened(model, windows, names).mean(dim=(1, 2)).tolist()
        rows.append(
            {
                "text": name,
                "none": loss(model, windows, []),
                "own": loss(model, windows, [name]),
                "own_and_next": loss(model, windows, [name, after]),
                "all": loss(model, windows, names),
                "next": after,
                "open": {pack: round(share, 4) for pack, share in zip(names, own_open, strict=True)},
            }
        )
    return rows


def mixed_row(model: PreTrainedModel, held_out: dict[str, Tensor]) -> dict[str, Any]:
    """Of text in which all alternate the loss without and with all packs, and where gates open."""
    names = list(held_out)
    sequences = mixed(list(held_out.values()))
    shares = opened(model, sequences, names).unflatten(-1, (-1, SEGMENT)).mean(dim=-1)  # packs, rows, segments
    row, segment = (torch.arange(size) for size in shares.shape[1:])
    text = (row[:, None] + segment) % len(names)
    own = torch.arange(len(names))[:, None, None] == text
    best = shares.argmax(dim=0) == text
    return {
        "text": "mixed",
        "none": loss(model, sequences, []),
        "all": loss(model, sequences, names),
        "own_open": round(shares[own].mean().item(), 4),
        "other_open": round(shares[~own].mean().item(), 4),
        "own_opens_most": round(best.float().mean().item(), 4),
    }


def parts_of(file: Path, folder: Path) -> tuple[Path, Path]:
    """Where the part of a text that is taught lies, and the part that is held out."""
    return folder / f"{file.stem}.txt", folder / f"{file.stem}-held-out.txt"


def config_of(files: Sequence[Path], run: Path, options: argparse.Namespace) -> LearnConfig:
    """A stream of packs, one of each text."""
    parts = [(file.stem, *parts_of(file, options.output)) for file in files]
    return learn_config(
        run=str(run),
        model=str(options.model),
        text=[f"{name}={taught}" for name, taught, _ in parts],
        heldout=[f"{name}={held_out}" for name, _, held_out in parts],
        method="pack",
        settings=options.set,
        memory={"background": [str(each) for each in options.background]},
        budget={},
        optim={"learning_rate": options.learning_rate},
        context=options.context,
        batch_size=options.batch_size,
        heldout_windows=options.windows,
        precision=options.precision,
        seed=options.seed,
        data=str(options.output / "tokens"),
    )


def main() -> None:
    """Teach, load, measure, unload, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--background", type=Path, nargs="*", default=[], help="default: the embedded corpus")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text that are taught")
    parser.add_argument("--in-a-row", action="store_true", help="one stream, each pack with those before it; one row")
    parser.add_argument("--windows", type=int, default=2, help="held-out windows that a stream is measured on")
    parser.add_argument("--held-out-tokens", type=int, default=1024)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--set", nargs="*", default=["megabytes=4", "gate_tokens=4096"], metavar="KEY=VALUE")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    key = {
        "model": options.model.name,
        "packs": [file.stem for file in options.text],
        "tokens": options.tokens,
        "context": options.context,
        "settings": options.set,
        "learning_rate": options.learning_rate,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "text": "in a row" if options.in_a_row else "mixed",
    }
    if has_row(rows_of(options.json), key):
        print("there are rows")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    started, folders = time.perf_counter(), {}
    for file in options.text:
        cut(file, *parts_of(file, options.output), (options.tokens, options.held_out_tokens))
    if options.in_a_row:
        after = learn(config_of(options.text, options.output / "in-a-row", options), resume="auto")
        stages = [{"after": row["stage"], "loss": row["loss"], "gates": row.get("gates")} for row in after]
        row = {"stages": stages, "seconds": round(time.perf_counter() - started, 1), **setting()}
        print(markdown_matrix(after))
        add_row(options.json, {**key, **row})
        return
    for file in options.text:
        folder = options.output / file.stem
        learn(config_of([file], folder, options), resume="auto")
        folders[file.stem] = folder / "stages" / f"1-{file.stem}" / "pack"
    model, tokenizer = load_model(options.model)
    windows = {
        file.stem: text_windows(tokenizer, [parts_of(file, options.output)[1]], options.context)
        for file in options.text
    }
    probe = next(iter(windows.values()))[:1]
    with torch.no_grad():
        before = model(input_ids=probe).logits
        for name, folder in folders.items():
            load_pack(model, folder, name)
        bf16 = has_bf16_products(torch.device("cpu"))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            rows = [*text_rows(model, windows), mixed_row(model, windows)]
        for name in folders:
            unload_pack(model, name)
        restored = torch.equal(model(input_ids=probe).logits, before)
    megabytes = [sum(path.stat().st_size for path in folder.iterdir()) / 1e6 for folder in folders.values()]
    common = {
        "megabytes": round(sum(megabytes) / len(megabytes), 3),
        "bits_restored": restored,
        "measured": "bf16" if bf16 else "fp32",
        "seconds": round(time.perf_counter() - started, 1),
        **setting(),
    }
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
        add_row(options.json, {**key, **row, **common})


if __name__ == "__main__":
    main()
