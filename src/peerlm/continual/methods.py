"""The ways to learn, by name."""

from dataclasses import fields
from typing import Any

from peerlm.continual.method import Method
from peerlm.errors import UserError
from peerlm.train.recipe import from_dict

METHODS = ("full", "lora", "grow", "pack", "pool", "sparse")


def method_of(name: str, settings: dict[str, Any]) -> Method:
    """The method of this name.

    Raises:
        UserError: there is none, or it has no such setting.
    """
    chosen = _method_class(name)
    if settings and not fields(chosen):
        raise UserError(f"method {name} has no settings, but {min(settings)} is given: leave it out")
    return from_dict(chosen, settings, prefix=f"{name}.")


def _method_class(name: str) -> type[Method]:
    if name == "full":
        return Method
    if name == "lora":
        from peerlm.continual.lora import Lora

        return Lora
    if name == "grow":
        from peerlm.continual.grown import Grown

        return Grown
    if name == "pack":
        from peerlm.continual.pack_per_stage import PackPerStage

        return PackPerStage
    if name == "pool":
        from peerlm.continual.pool import Pool

        return Pool
    if name == "sparse":
        from peerlm.continual.sparse import Sparse

        return Sparse
    raise UserError(f"there is no method {name!r}; choose one of {', '.join(METHODS)}")
