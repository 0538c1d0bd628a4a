"""Convert a saved model to another folder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peerlm.convert.conversion import convert, kind_named, unconvert
from peerlm.convert.record import conversion_of
from peerlm.convert.saved import count_parameters, load_saved, save_changed
from peerlm.errors import UserError, check_seed


def convert_folder(
    source: Path,
    output: Path,
    *,
    mode: str = "beside",
    layers: str | Sequence[int] | None = None,
    init: str = "random",
    settings: dict[str, Any] | None = None,
    samples: Iterable[Mapping[str, Any]] | None = None,
    undo: bool = False,
    seed: int = 0,
    report: Callable[[str, int, int], object] | None = None,
    measure: Callable[[PreTrainedModel], float] | None = None,
) -> dict[str, Any]:
    """Load a model that `save_pretrained` wrote, convert it (or with `undo` unconvert it), and save it.

    Args:
        source: its folder; the class that its configuration names is loaded.
        output: the folder to write, whole or not at all; the tokenizer is copied.
        mode, layers, init, settings, samples: as `convert` takes them.
        undo: call `unconvert`, and nothing else.
        seed: of the new weights.
        report: as of `fit_neurons`.
        measure: the perplexity of a model, on text that `samples` do not hold; called before and after.

    Returns:
        "layers" (paths of the feed-forward layers), "mode", "init", "parameters_before", "parameters_after"; with
        `measure` "perplexity_before", "perplexity_after"; with samples "layer_errors" (`IndexFit.error` by the path of
        the new layer). The card of a converted model states perplexities and errors too.

    Raises:
        UserError: the output exists, the model cannot be read, or `convert` refuses it.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a new folder")
    check_seed(seed)
    settings = settings or {}
    if not undo:
        try:  # before the model is read, which may take long
            kind_named(init, mode=mode, settings=settings, has_samples=samples is not None)
        except (ValueError, TypeError) as error:
            raise UserError(f"cannot convert {source}: {error}") from error
    model = load_saved(source)
    before = count_parameters(model)
    perplexity = {} if measure is None else {"perplexity_before": measure(model)}
    torch.manual_seed(seed)
    errors: dict[str, float] = {}
    try:
        if undo:
            record = conversion_of(model)
            unconvert(model)
        else:
            fit = {"seed": seed, "report": report, "learned": lambda path, fit: errors.update({path: fit.error})}
            convert(model, mode=mode, layers=layers, init=init, samples=samples, fit=fit, **settings)
            record = conversion_of(model)
    except (ValueError, TypeError, FloatingPointError, RuntimeError, MemoryError) as error:  # torch's for memory too
        raise UserError(f"cannot convert {source}: {error}") from error
    assert record is not None  # unconvert refuses a model without one
    if measure is not None:
        perplexity["perplexity_after"] = measure(model)
    measured: dict[str, Any] = {**perplexity, **({"layer_errors": errors} if errors else {})}
    save_changed(model, source, output, measured=measured)
    return {
        "layers": [site.path for site in record.read_sites()],
        "mode": record.mode,
        "init": record.init,
        "parameters_before": before,
        "parameters_after": count_parameters(model),
        **measured,
    }
