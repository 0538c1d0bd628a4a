"""What clients may send: each field of a request, and what is refused rather than ignored."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from peerlm.errors import shortened

MOST_CHOICES = 128
"""Most texts that one request may ask for: prompts times n."""
MOST_STOPS = 16
MOST_BIASES = 1024
_MOST_STOP_CHARACTERS = 256
_MOST_NAME = 512


def only(*values: object) -> AfterValidator:
    """Takes null and these values, at which a field of OpenAI's changes nothing; refuses all others."""

    def check(value: object) -> object:
        if value is not None and not any(type(value) is type(other) and value == other for other in values):
            allowed = f"leave it out, or send {' or '.join(map(repr, values))}" if values else "leave it out"
            raise ValueError(f"this server does not support it: {allowed}")
        return value

    return AfterValidator(check)


Empty = Annotated[Any, only("", [], {}, False), Field(description="Not supported: null or empty.")]
Unused = Annotated[Any, Field(description="Read by no one here: it changes no text.")]
FIRST = Field(fail_fast=True)
"""Of a list with a million faults only the first is looked for."""
Token = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Tokens = Annotated[list[Token], FIRST]
Name = Annotated[str, Field(max_length=_MOST_NAME)]


class Body(BaseModel):
    """A body without unknown fields, and with values of the right type alone."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        """Refuse the first unknown field: errors of each of a million would take the server long to collect."""
        unknown = (
            next((name for name in given if name not in cls.model_fields), None) if isinstance(given, dict) else None
        )
        if unknown is not None:
            raise ValueError(
                f"unknown field {shortened(unknown, 60)!r}: this server refuses fields that it does not know"
            )
        return given


class StreamOptions(Body):
    """What a stream says besides the text."""

    include_usage: bool = False
    """End with a chunk that counts tokens."""
    continuous_usage_stats: bool = False
    """Count tokens in every chunk, as vLLM does."""
    include_obfuscation: Annotated[bool | None, only(False)] = None


class Sampled(Body):
    """Fields of completions and of chats alike."""

    model: Name
    """BASE, BASE:PACK or BASE:PACK+PACK, as /v1/models lists them."""
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    """-1 and 0 stand for all tokens."""
    min_p: float | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Of the first choice; choice i has seed + i."""
    stop: str | Annotated[list[str], FIRST] | None = None
    stop_token_ids: Tokens | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    experts: bool | None = None
    """Of this server: tell which experts each token used."""
    add_special_tokens: bool | None = None
    include_stop_str_in_output: Annotated[bool | None, only(False)] = None
    skip_special_tokens: Annotated[bool | None, only(True)] = None
    user: Unused = None
    metadata: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_retention: Unused = None
    store: Annotated[bool | None, only(False)] = None
    service_tier: Annotated[str | None, only("auto", "default")] = None

    @field_validator("stream_options")
    @classmethod
    def _check_streams(cls, options: StreamOptions | None, others: ValidationInfo) -> StreamOptions | None:
        if options is not None and not others.data.get("stream"):
            raise ValueError("it needs stream = true: leave it out, or ask for a stream")
        return options

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > MOST_STOPS or any(not 0 < len(text) <= _MOST_STOP_CHARACTERS for text in texts):
            raise ValueError(f"give at most {MOST_STOPS} texts of 1 to {_MOST_STOP_CHARACTERS} characters")
        return stop

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_bias(cls, bias: Any) -> Any:
        if isinstance(bias, dict):
            if len(bias) > MOST_BIASES:
                raise ValueError(f"it has {len(bias):,} tokens; give at most {MOST_BIASES:,}")
            for token in bias:
                if not (token.isascii() and token.isdigit() and len(token) < 11):
                    raise ValueError(f"{shortened(token, 20)!r} is no token id")
        return bias

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end a choice."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """Choices for each prompt."""
        return self.n or 1


class CompletionBody(Sampled):
    """A request to continue one text or several."""

    prompt: str | Annotated[list[str], FIRST] | Tokens | Annotated[list[Tokens], FIRST]
    echo: bool | None = None
    logprobs: Count | None = None
    """How many of the likeliest tokens come with each token."""
    best_of: Count | None = None
    """Only equal to n."""
    suffix: Annotated[str | None, only("")] = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """One text, or one list of token ids, for each prompt."""
        given: Any = self.prompt
        one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        return [given] if one else given


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """What one side has said."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], FIRST] | None = None
    name: Name | None = None
    refusal: Empty = None
    audio: Empty = None
    tool_calls: Empty = None
    tool_call_id: Empty = None
    function_call: Empty = None
    annotations: Empty = None

    @property
    def for_template(self) -> dict[str, str]:
        """What a chat template reads of it."""
        return {"role": self.role, "content": self.text} | ({} if self.name is None else {"name": self.name})

    @property
    def text(self) -> str:
        """The parts as one text."""
        if isinstance(self.content, str) or self.content is None:
            return self.content or ""
        return "".join(part.text for part in self.content)


class ResponseFormat(Body):
    """What the text must be like."""

    type: Annotated[str, only("text")]


class ChatBody(Sampled):
    """A request for the next message of a chat."""

    messages: Annotated[list[ChatMessage], FIRST, Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    """Another name of max_tokens."""
    add_special_tokens: Annotated[bool | None, only(False)] = None
    """The template says what begins a chat."""
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    response_format: ResponseFormat | None = None
    tools: Empty = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: Unused = None
    functions: Empty = None
    function_call: Annotated[Any, only("none", "auto")] = None
    modalities: Annotated[list[str] | None, only(["text"])] = None
    audio: Empty = None
    prediction: Empty = None
    moderation: Empty = None
    prompt_cache_options: Empty = None
    reasoning_effort: Annotated[str | None, only("none")] = None
    verbosity: Annotated[str | None, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _check_same(cls, most: int | None, others: ValidationInfo) -> int | None:
        other = others.data.get("max_tokens")
        if most is not None and other is not None and most != other:
            raise ValueError(f"it is {most:,}, but max_tokens is {other:,}: they mean the same, so give one of them")
        return most


class LoadBody(Body):
    """A pack or an adapter to load."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    """A folder below the one that the server was started with."""
    load_inplace: Annotated[bool | None, only(False)] = None


class UnloadBody(Body):
    """A pack or an adapter to unload."""

    lora_name: Name
    lora_int_id: Unused = None


class TokenizeBody(Body):
    """A text, or a chat, whose token ids are asked for."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], FIRST] | None = None
    model: Name | None = None
    add_special_tokens: bool | None = None
    """Of a prompt: whether it begins as documents do; default: yes."""
    add_generation_prompt: bool | None = None
    """Of a chat: whether the next message begins; default: yes."""
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Token ids whose text is asked for."""

    tokens: Annotated[list[Token], FIRST, Field(max_length=2**20)]
    model: Name | None = None
