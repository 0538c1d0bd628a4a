"""/tokenize, /detokenize and /tokenizer_info: texts to token ids and back, in vLLM's shapes."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from peerlm.serve.http.bodies import DetokenizeBody, TokenizeBody
from peerlm.serve.http.problems import Problem, documented
from peerlm.serve.http.served import Served
from peerlm.serve.http.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["Tokens"])


class Tokens(BaseModel):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    """The text of token ids."""

    prompt: str


@router.post("/tokenize", responses=documented(400, 401, 404, 413))
async def tokenize(body: TokenizeBody, served: Served) -> Tokens:
    """Token ids of a prompt, or of a chat."""
    if body.model is not None:
        served.packs(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Problem(400, "give either prompt or messages", param="prompt")
    if body.messages is not None and body.add_special_tokens:
        message = "add_special_tokens is true, but the chat template says what begins a chat: leave it out"
        raise Problem(400, message, param="add_special_tokens")
    if body.prompt is not None and body.add_generation_prompt:
        message = "add_generation_prompt is true, but a prompt has no messages: leave it out"
        raise Problem(400, message, param="add_generation_prompt")
    if body.messages is not None:
        messages = [message.for_template for message in body.messages]
        ids = await served.tokenized(served.texts.chat_ids, messages, answer=body.add_generation_prompt is not False)
    else:
        ids = await served.tokenized(served.texts.ids, body.prompt, special=body.add_special_tokens is not False)
    shown = [served.texts.token(token)[0] for token in ids] if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=served.engine.context, tokens=ids, token_strs=shown)


@router.post("/detokenize", responses=documented(400, 401, 404, 413))
async def detokenize(body: DetokenizeBody, served: Served) -> Text:
    """The text of token ids."""
    if body.model is not None:
        served.packs(body.model)
    unknown = next((token for token in body.tokens if token >= served.engine.vocab_size), None)
    if unknown is not None:
        message = f"there is no token {unknown}; ids are below {served.engine.vocab_size:,}"
        raise Problem(400, message, param="tokens")
    return Text(prompt=await served.tokenized(served.texts.text, body.tokens))


@router.get("/tokenizer_info", responses=documented(401))
def tokenizer_info(served: Served) -> dict[str, Any]:
    """The tokens that begin and end texts, and the chat template: what lm-eval asks for."""
    tokenizer = served.texts.tokenizer
    template = tokenizer.chat_template
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
        "chat_template": template if isinstance(template, str) else None,
    }
