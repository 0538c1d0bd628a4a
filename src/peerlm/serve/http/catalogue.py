"""Names of models: the base alone, or with packs and adapters beside it."""

from collections.abc import Mapping

from openai.types import Model

from peerlm.errors import listed
from peerlm.serve.http.problems import Problem
from peerlm.serve.protocol import Loaded


def packs_of(model: str, base: str, loaded: Mapping[str, Loaded]) -> tuple[str, ...]:
    """The packs that a model's name stands for: BASE, BASE:PACK, BASE:PACK+PACK, or a pack's name alone.

    Raises:
        Problem: there is no such model, 404.
    """
    if model == base:
        return ()
    names = tuple((model.removeprefix(f"{base}:") if model.startswith(f"{base}:") else model).split("+"))
    unknown = [name for name in names if name not in loaded]
    if unknown:
        known = f"base model {base}, packs: {listed(loaded)}"
        message = f"there is no model {model!r}; this server has {known}"
        raise Problem(404, message, param="model", code="model_not_found")
    if len(set(names)) < len(names):
        raise Problem(400, f"the model {model!r} names a pack twice; name each once", param="model")
    return names


def listing(base: str, loaded: Mapping[str, Loaded], *, created: int, context: int, chat: bool) -> list[Model]:
    """The base and each pack as models, as /v1/models shows them.

    Besides OpenAI's fields they have max_model_len, the most tokens of prompt and text together; chat, whether the
    tokenizer has a chat template; and packs have parent, the base, and kind.
    """
    facts = {"object": "model", "created": created, "owned_by": "peerlm", "max_model_len": context, "chat": chat}
    return [
        Model.model_validate({"id": base, "parent": None, **facts}),
        *(
            Model.model_validate({"id": f"{base}:{name}", "parent": base, "kind": entry.kind, **facts})
            for name, entry in loaded.items()
        ),
    ]
