"""/v1/models, and the routes that change what is loaded: vLLM's names."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from openai.types import Model
from pydantic import BaseModel

from peerlm.serve.http.bodies import LoadBody, UnloadBody
from peerlm.serve.http.catalogue import listing
from peerlm.serve.http.problems import Problem, documented
from peerlm.serve.http.served import Served, ServedModel
from peerlm.serve.http.strict import StrictRoute
from peerlm.serve.protocol import InUse

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])
packs_router = APIRouter(route_class=StrictRoute, tags=["Packs"])


class ModelList(BaseModel):
    """All models."""

    object: str = "list"
    data: list[Model]


def _models(served: ServedModel) -> list[Model]:
    return listing(
        served.settings.name,
        served.engine.loaded(),
        created=served.created,
        context=served.engine.context,
        chat=served.texts.has_chat,
    )


@router.get("/v1/models", responses=documented(401))
def models(served: Served) -> ModelList:
    """The base model, and each pack and adapter beside it."""
    return ModelList(data=_models(served))


@router.get("/v1/models/{model:path}", responses=documented(401, 404))
def model(model: str, served: Served) -> Model:
    """One of them; several packs as BASE:PACK+PACK."""
    served_models = {found.id: found for found in _models(served)}
    if model in served_models:
        return served_models[model]
    packs = served.packs(model)
    base = served_models[served.settings.name].model_dump()
    return Model.model_validate({**base, "id": model, "parent": base["id"], "packs": list(packs)})


@packs_router.post(
    "/v1/load_lora_adapter", responses=documented(400, 401, 403, 404, 413), response_class=PlainTextResponse
)
async def load(body: LoadBody, served: Served) -> str:
    """Load a pack, a LoRA adapter or a library of adapters from a folder, while other requests run."""
    if body.lora_name == served.settings.name:
        raise Problem(400, f"{body.lora_name!r} is the name of the base model; choose another", param="lora_name")
    try:
        folder = await served.changed(folder_within, served.settings.packs_folder, body.lora_path)
        loaded = await served.changed(served.engine.load, body.lora_name, folder)
    except ValueError as error:
        raise Problem(400, str(error), code="not_loaded") from error
    return f"Success: {loaded.kind} '{loaded.name}' added: the model {served.settings.name}:{loaded.name}."


@packs_router.post(
    "/v1/unload_lora_adapter", responses=documented(400, 401, 403, 404, 409, 413), response_class=PlainTextResponse
)
async def unload(body: UnloadBody, served: Served) -> str:
    """Unload one; waits for requests that use it."""
    if body.lora_name not in served.engine.loaded():
        message = f"nothing called {body.lora_name!r} is loaded"
        raise Problem(404, message, param="lora_name", code="model_not_found")
    try:
        await served.changed(served.engine.unload, body.lora_name)
    except InUse as error:
        raise Problem(409, str(error), code="in_use", headers={"retry-after": "5"}) from error
    except ValueError as error:
        raise Problem(400, str(error), param="lora_name") from error
    return f"Success: '{body.lora_name}' removed."


def folder_within(root: Path | None, given: str) -> Path:
    """The folder below `root` that a request names.

    Raises:
        Problem: there is no root, 403; the name leads out of it or nowhere, 400.
    """
    if root is None:
        message = "no packs are loaded over HTTP: start the server with --pack-folder"
        raise Problem(403, message, param="lora_path", code="no_pack_folder")
    if "\0" in given or "\\" in given or Path(given).is_absolute() or ".." in Path(given).parts:
        message = f"lora_path is {given!r}; name a folder below the server's --pack-folder, without .. and not absolute"
        raise Problem(400, message, param="lora_path")
    try:
        top = root.resolve(strict=True)
        folder = (top / given).resolve(strict=True)
        inside = folder.is_relative_to(top) and folder != top and folder.is_dir()
        files = [path.resolve(strict=True) for path in folder.rglob("*")] if inside else []
        inside = inside and all(file.is_relative_to(folder) for file in files)
    except (OSError, RuntimeError, ValueError):
        inside = False
    if not inside:
        message = f"lora_path is {given!r}, which is no folder below the server's --pack-folder"
        raise Problem(400, message, param="lora_path")
    return folder
