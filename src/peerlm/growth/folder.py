"""Give a saved model more experts or fewer, in another folder."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from peerlm.convert.saved import count_parameters, load_saved, save_changed
from peerlm.errors import UserError, check_seed
from peerlm.growth.growing import grow, set_opening, to_shells
from peerlm.growth.indexed import find_indexed_layers
from peerlm.growth.new_experts import check_keys
from peerlm.growth.observation import observe
from peerlm.growth.shrinking import shrink

Samples = Iterable[Mapping[str, Any]]


def grow_folder(
    source: Path,
    output: Path,
    num_experts: int,
    *,
    keys: str = "random",
    samples: Samples | None = None,
    opening: float = 0.0,
    renumber: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Load a model that `save_pretrained` wrote, let its layers grow, and save it.

    Args:
        source: its folder.
        output: the folder to write, whole or not at all; the tokenizer is copied.
        num_experts, keys: as `grow` takes them.
        samples: what the model reads where `keys` depend on it (`observe`).
        opening: how far the new experts are let in, as `set_opening` takes it; at 0 the model's output is what it was.
        renumber: call `to_shells` first. A model of pairing "row-major" is refused without it.
        seed: of the new weights.

    Returns:
        "layers" (their paths), "experts_before" (those of the first), "experts_after", "opening", "parameters_before",
        "parameters_after".

    Raises:
        UserError: the output exists, the model cannot be read, or cannot grow so.
    """
    check_seed(seed)
    try:
        check_keys(keys)
    except ValueError as error:
        raise UserError(f"cannot grow {source}: {error}") from error
    if keys != "random" and samples is None:
        raise UserError(f"--keys {keys} depends on what the model reads; give --text FILE too")
    if keys == "random" and samples is not None:
        raise UserError("--keys random reads no text; leave --text out, or take --keys crowded or data")

    def change(model: PreTrainedModel) -> None:
        if any(layer.index.pairing != "shells" for layer in find_indexed_layers(model)):
            if not renumber:
                raise UserError(
                    f"the experts of {source} are numbered row by row, and growth would move them; renumber them as "
                    "well, with --renumber"
                )
            to_shells(model)
        seen = {} if samples is None else vars(observe(model, samples))
        grow(model, num_experts, keys=keys, seed=seed, **seen)
        set_opening(model, opening)

    return _change(source, output, "grow", change) | {"opening": opening}


def shrink_folder(source: Path, output: Path, num_experts: int | None, samples: Samples) -> dict[str, Any]:
    """Load a model that `save_pretrained` wrote, take away experts that it does not use on samples, and save it.

    Arguments and result as `grow_folder`; `num_experts` None loses none that samples use.

    Raises:
        UserError: the output exists, the model cannot be read, or cannot shrink so.
    """
    return _change(
        source, output, "shrink", lambda model: shrink(model, num_experts, usage=observe(model, samples).usage)
    )


def _change(source: Path, output: Path, what: str, change: Callable[[PreTrainedModel], object]) -> dict[str, Any]:
    if output.exists():
        raise UserError(f"{output} exists already; name a new folder")
    model = load_saved(source)
    parameters_before = count_parameters(model)
    try:
        layers = find_indexed_layers(model)
        experts_before = layers[0].index.num_experts
        change(model)
    except (ValueError, RuntimeError, MemoryError) as error:  # torch's own for too little memory
        raise UserError(f"cannot {what} {source}: {error}") from error
    save_changed(model, source, output)
    return {
        "layers": [layer.name for layer in layers],
        "experts_before": experts_before,
        "experts_after": layers[0].index.num_experts,
        "parameters_before": parameters_before,
        "parameters_after": count_parameters(model),
    }
