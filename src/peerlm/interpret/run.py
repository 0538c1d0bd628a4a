"""Inspect a run or a saved model: a page, and its figures as JSON."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peerlm.errors import UserError
from peerlm.evaluate.encoding import encode
from peerlm.evaluate.files import PASSAGE, fields_of, read_documents
from peerlm.evaluate.likelihood import Report, check_context, exp, last_logits
from peerlm.evaluate.loading import default_context, load_model
from peerlm.evaluate.progress import progress_bar
from peerlm.evaluate.windows import begin_windows
from peerlm.files import write_bytes
from peerlm.interpret.collection import Collected, LayerRecord, collect
from peerlm.interpret.edits import PLACES, Edit, Effect, edit, edit_effects, likeliest
from peerlm.interpret.inspected import InspectedLayer, find_inspected_layer, find_inspected_layers
from peerlm.interpret.lens import Pushes, find_readout, pushes
from peerlm.interpret.page import render
from peerlm.interpret.page_data import edit_data, layer_data, listed_experts, text_data
from peerlm.interpret.strings import TokenStrings
from peerlm.interpret.summary import layer_figures, relative_use
from peerlm.interpret.windows import read_windows, window_nats
from peerlm.layers.modes import evaluating
from peerlm.marks import AUTO, marked, marks_of

FACTORS = (0.0, 2.0)
"""What the output of an edited expert is multiplied by."""
_LENS_TOKENS = 6
_NAMED_EXPERTS = 10


def inspect(
    path: str | Path,
    text: str | Path,
    *,
    output: str | Path | None = None,
    limit: int = 65536,
    shown: int = 512,
    context: int | None = None,
    experts: int = 16384,
    edits: int = 64,
    document_start: str = AUTO,
    packs: Sequence[str | Path] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Read a text with the model of a run or a saved model, and write a page about its experts.

    Args:
        path: as `load_model`.
        text: a text, JSONL or parquet file, as `evaluate.files` reads them.
        output: the page to write, whole or not at all; None writes none.
        limit: tokens of the text that are read.
        shown: tokens at its start that the page shows one by one.
        context: tokens of a window, each read on its own; default: as trained.
        experts: how many of each layer the page holds one by one, those that write most.
        edits: experts, over all layers, that are knocked out and doubled in the shown tokens; 0 leaves that out.
        document_start: what stands before each document: "auto", "none" or a token (see `peerlm.marks`).
        packs: folders of packs to load beside the model's feed-forward layers; their experts are looked at too.
        overwrite: whether a page that is there is replaced.
        progress: whether to show on stderr how far it is.

    Returns:
        The page's figures, ready for JSON: file, tokens, loss (nats per token), perplexity, layers (a list: figures of
        `layer_figures`, and the experts that wrote most, with their tokens and contexts), edits.

    Raises:
        UserError: a model or text that cannot be used, or an impossible number.
    """
    for name, value, least in (("limit", limit, 2), ("shown", shown, 1), ("experts", experts, 1), ("edits", edits, 0)):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    if output is not None and (Path(output).is_dir() or not Path(output).parent.is_dir()):
        raise UserError(f"{output} cannot be written: name a file in a folder that exists")
    if output is not None and Path(output).exists() and not overwrite:
        raise UserError(f"{output} exists already: name another file with --output, or replace it with --overwrite")
    model, tokenizer, layers, tokens, context, begins = _open(path, text, context, limit, document_start, packs)
    readout = find_readout(model)
    shown = min(shown, len(tokens))
    with progress_bar(shown=progress) as bar:
        collected = collect(
            model,
            layers,
            tokens,
            context=context,
            shown=shown,
            readout=readout,
            report=_reporter(bar, "read the text"),
        )
        if not math.isfinite(exp(collected.loss)):
            raise UserError(f"{path} has a loss of {collected.loss} on {text}; name a model whose weights are whole")
        listed = [listed_experts(record, experts) for record in collected.layers]
        pushed = [
            pushes(
                readout,
                layer,
                ids,
                kept=_LENS_TOKENS,
                inverse_scale=collected.inverse_scale,
                report=_reporter(bar, f"lens of layer {layer.number}"),
            )
            for layer, ids in zip(layers, listed, strict=True)
        ]
        chosen = _most_important(layers, collected, edits)
        wanted = [Edit(layer.number, expert, factor) for layer, expert in chosen for factor in FACTORS]
        effects = edit_effects(
            model, tokens[:shown], wanted, context=context, report=_reporter(bar, "knock out, boost")
        )
    strings = TokenStrings(tokenizer)
    scored = max(1, int(collected.nats[:shown].isfinite().sum()))
    head = {
        "model": str(path),
        "file": str(text),
        "tokens": len(tokens),
        "context": context,
        "document_start": begins,
        "loss": collected.loss,
        "perplexity": exp(collected.loss),
        "final_norm": readout.norm is not None,
    }
    loss_shown = collected.nats[:shown].nanmean().item()
    parts = list(zip(layers, collected.layers, listed, pushed, strict=True))
    if output is not None:
        data = {
            **head,
            **text_data(tokens, collected, strings),
            "shown_loss": loss_shown if math.isfinite(loss_shown) else None,
            "factors": FACTORS,
            "layers": [layer_data(*part, strings) for part in parts],
            "edits": edit_data(effects, scored, strings),
            "strings": strings.strings,
        }
        write_bytes(Path(output), render(f"{Path(path).resolve().name}: experts", data).encode())
    return {
        **head,
        "layers": [
            {
                **layer_figures(layer, record),
                "experts": [
                    _expert_row(layer, record, ends, int((ids == expert).nonzero()), expert, tokens, strings)
                    for expert in ids[record.importance_N[ids].topk(min(_NAMED_EXPERTS, len(ids))).indices].tolist()
                ],
            }
            for layer, record, ids, ends in parts
        ],
        "edits": [_edit_row(effect, scored) for effect in effects],
    }


def change_of_edits(
    path: str | Path,
    text: str | Path,
    edits: Sequence[Edit],
    *,
    limit: int = 65536,
    context: int | None = None,
    document_start: str = AUTO,
    packs: Sequence[str | Path] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """What all these edits together change in a text.

    Args:
        path, text, limit, context, document_start, packs, progress: as of `inspect`.
        edits: experts and factors, applied at the same time.

    Returns:
        Ready for JSON: tokens (scored), loss and edited_loss (nats per token), change, perplexity, edited_perplexity,
        and places: where the next-token distribution changes most, with the text before, the divergence in nats, and
        the likeliest next tokens before and after.

    Raises:
        UserError: as `inspect`, no edits, or an edit of an expert that is not there.
    """
    if not edits:
        raise UserError("there are no edits; name at least one expert")
    if limit < 2:
        raise UserError(f"limit is {limit}; it must be at least 2")
    model, tokenizer, layers, tokens, context, begins = _open(path, text, context, limit, document_start, packs)
    for item in edits:
        find_inspected_layer(layers, item.layer, item.expert)
    sums = torch.zeros(2, dtype=torch.float64)
    scored = 0
    found: list[tuple[float, int, list[tuple[int, float]], list[tuple[int, float]]]] = []
    with progress_bar(shown=progress) as bar:
        before = read_windows(model, tokens, context=context, report=_reporter(bar, "read the text, with and without"))
        for positions, logits in before:
            with ExitStack() as stack:
                for item in edits:
                    stack.enter_context(edit(model, item.layer, item.expert, item.factor))
                with evaluating(model):
                    after = last_logits(model, tokens[positions].to(logits.device), positions.shape[1])
            windows = tokens[positions]
            nats = window_nats(logits, windows)
            scored += int(nats.isfinite().sum())
            sums += torch.stack([nats.nansum(), window_nats(after, windows).nansum()])
            found = sorted([*found, *_changed_places(positions, logits, after)], key=lambda place: -place[0])[:PLACES]
    scored = max(1, scored)
    loss, edited_loss = (sums / scored).tolist()
    strings = TokenStrings(tokenizer)
    return {
        "model": str(path),
        "file": str(text),
        "edits": [vars(item) for item in edits],
        "document_start": begins,
        "tokens": scored,
        "loss": loss,
        "edited_loss": edited_loss,
        "change": edited_loss - loss,
        "perplexity": exp(loss),
        "edited_perplexity": exp(edited_loss),
        "places": [
            {
                "after": _text(tokens[max(0, position - 8) : position + 1], strings),
                "divergence": divergence,
                "before_edit": [(strings.string(token), probability) for token, probability in old],
                "after_edit": [(strings.string(token), probability) for token, probability in new],
            }
            for divergence, position, old, new in found
        ],
    }


def _changed_places(
    positions_BT: Tensor, before: Tensor, after: Tensor
) -> list[tuple[float, int, list[tuple[int, float]], list[tuple[int, float]]]]:
    """(divergence, position, likeliest tokens before, after) of the places that change most, if any does."""
    old, new = before.flatten(0, 1).log_softmax(dim=-1), after.flatten(0, 1).log_softmax(dim=-1)
    divergence = (old.exp() * (old - new)).sum(dim=-1)
    most = divergence.topk(min(PLACES, len(divergence)))
    return [
        (value, int(positions_BT.flatten()[place]), likeliest(old[place]), likeliest(new[place]))
        for value, place in zip(most.values.tolist(), most.indices.tolist(), strict=True)
        if value > 0
    ]


def _open(
    path: str | Path,
    text: str | Path,
    context: int | None,
    limit: int,
    document_start: str,
    packs: Sequence[str | Path],
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, list[InspectedLayer], Tensor, int, str | None]:
    """The model, its tokenizer, layers with experts, the text's first tokens, the context, what begins a document."""
    fields = fields_of(Path(text))
    if fields == PASSAGE:
        raise UserError(f"{text} holds passages and no documents; name a text, JSONL or parquet file of documents")
    model, tokenizer = load_model(path, packs)
    layers = find_inspected_layers(model)
    context = default_context(path, model) if context is None else context
    check_context(model, context)
    marks = marks_of(model, tokenizer, document_start)
    documents = read_documents(Path(text), fields)
    tokens = encode(tokenizer, documents, marks, limit=limit, name=Path(text).name).tokens
    tokens = begin_windows(tokens, context, marks.window_start)[:limit]
    return model, tokenizer, layers, tokens, context, marked(marks.start, tokenizer)


def _most_important(
    layers: Sequence[InspectedLayer], collected: Collected, number: int
) -> list[tuple[InspectedLayer, int]]:
    """The experts that wrote most in the shown tokens, as many of each layer, `number` in all."""
    chosen = []
    for place, (layer, record) in enumerate(zip(layers, collected.layers, strict=True)):
        quota = number // len(layers) + (place < number % len(layers))
        listed = record.expert_SM >= 0
        ids = record.expert_SM[listed]
        wrote = (record.weight_SM * record.activation_SM).abs()[listed] * record.norm_N[ids]
        importance_N = torch.zeros(layer.num_experts).scatter_add_(0, ids, wrote)
        best = importance_N.topk(min(quota, len(ids.unique()))).indices
        chosen += [(layer, expert) for expert in best.tolist()]
    return chosen


def _expert_row(
    layer: InspectedLayer,
    record: LayerRecord,
    ends: Pushes,
    slot: int,
    expert: int,
    tokens: Tensor,
    strings: TokenStrings,
) -> dict[str, Any]:
    """One expert, ready for JSON."""
    i, j = (int(half) for half in layer.pairs(torch.tensor(expert)))
    places = record.contexts.position_NC[expert].tolist()
    return {
        "expert": expert,
        "sub_keys": [i, j],
        "use": relative_use(record)[expert].item(),
        "importance": (record.importance_N[expert] / record.importance_N.sum().clamp_min(1e-300)).item(),
        "up": [strings.string(token) for token in ends.up[slot].tolist()],
        "down": [strings.string(token) for token in ends.down[slot].tolist()],
        "contexts": [_text(tokens[max(0, place - 8) : place + 1], strings) for place in places if place >= 0],
    }


def _edit_row(effect: Effect, scored: int) -> dict[str, Any]:
    return {**vars(effect.edit), "change": effect.change.sum().item() / scored}


def _text(tokens: Tensor, strings: TokenStrings) -> str:
    return "".join(strings.strings[place] for place in strings.text(tokens.tolist()))


def _reporter(bar: Progress, name: str) -> Report:
    """A task of the bar, as what reports to it."""
    task = bar.add_task(name, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)
