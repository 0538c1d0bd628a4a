"""Give a saved model more experts, in another folder."""

from pathlib import Path
from typing import Any

from peerlm.errors import UserError
from peerlm.layers import PEER
from peerlm.surgery.grow import grow, set_opening, to_shells
from peerlm.surgery.saved import check_seed, count_parameters, load_saved, save_changed


def grow_folder(
    source: Path,
    output: Path,
    num_experts: int,
    *,
    opening: float = 0.0,
    renumber: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Load a model that `save_pretrained` wrote, let its PEER layers grow, and save it.

    Args:
        source: its folder.
        output: the folder to write, whole or not at all; the tokenizer is copied.
        num_experts: of every PEER layer, as `grow` takes it.
        opening: how far the new experts are let in, as `set_opening` takes it; at 0 the model's output is what it was.
        renumber: call `to_shells` first. A model of pairing "row-major" is refused without it.
        seed: of the new weights.

    Returns:
        "layers" (their paths), "experts_before" (those of the first), "experts_after", "opening", "parameters_before",
        "parameters_after".

    Raises:
        UserError: the output exists, the model cannot be read, or cannot grow so.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a new folder")
    check_seed(seed)
    model = load_saved(source)
    before = count_parameters(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PEER)}
    experts_before = [layer.experts.num_experts for layer in layers.values()]
    if not renumber and any(layer.product_keys.pairing != "shells" for layer in layers.values()):
        raise UserError(
            f"the experts of {source} are numbered row by row, and growth would move them; renumber them as well, "
            "with --renumber"
        )
    try:
        if renumber:
            to_shells(model)
        grow(model, num_experts, seed=seed)
        set_opening(model, opening)
    except (ValueError, RuntimeError, MemoryError) as error:  # torch's own for too little memory
        raise UserError(f"cannot grow {source}: {error}") from error
    save_changed(model, source, output)
    return {
        "layers": list(layers),
        "experts_before": experts_before[0],
        "experts_after": num_experts,
        "opening": opening,
        "parameters_before": before,
        "parameters_after": count_parameters(model),
    }
