"""Bodies of requests. What cannot be honoured is refused: nothing is ignored in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from trimkv_edge.runtime.sampling import SamplingParams

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
# Parameters that clients send with the value that means "off".
Off = Annotated[float, Field(ge=0, le=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is; it is always shown at the size that suits it, so there is one ``detail``."""

    url: Text
    detail: Literal["auto"] | None = None


class ImagePart(_Strict):
    """A picture in a message; sounds and files are refused."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
# Tagged, so that a mistake in a part is told, and not that a list is no text.
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Tag("parts")],
    Discriminator(lambda content: "parts" if isinstance(content, list) else "text"),
]


class Message(_Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @model_validator(mode="after")
    def _check_images(self) -> Message:
        if self.role != "user" and self.images:
            raise ValueError(f"messages of role {self.role} show no images: put them into one of role user")
        return self

    @property
    def said_by(self) -> str:
        """The role as templates name it: "developer" is a newer word for "system"."""
        return "system" if self.role == "developer" else self.role

    @property
    def text(self) -> str:
        """The words of the content."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """URLs of its pictures, in order."""
        parts = [] if isinstance(self.content, str) else self.content
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class StreamOptions(_Strict):
    """``include_usage`` sends the token counts in a chunk of their own, before the end."""

    include_usage: bool = False


class TextFormat(_Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(_Strict):
    """Some JSON object."""

    type: Literal["json_object"]


class JsonSchema(_Strict):
    """``schema`` is always kept to, so ``strict`` may say what it likes."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    wanted: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(_Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class _Generation(_Strict):
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    frequency_penalty: Off | None = None
    presence_penalty: Off | None = None
    user: Annotated[str, Field(min_length=1, max_length=200)] | None = None

    @model_validator(mode="after")
    def _check(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams only: send stream=true, or leave it out")
        self.sampling()
        return self

    def sampling(self) -> SamplingParams:
        """How tokens are chosen; greedy unless a temperature is given, as in the project's commands.

        Raises:
            ConfigError: a value is out of range (a validation error while the request is read).
        """
        return SamplingParams.asked(self) or SamplingParams()

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(_Generation):
    """Body of ``/v1/chat/completions``; ``conversation`` is ours."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    conversation: Annotated[str, Field(min_length=1, max_length=200)] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        last = self.messages[-1]
        if last.role != "user" or not (last.text.strip() or last.images):
            raise ValueError("the last message must be of role user, and not empty: it is what gets answered")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError(f"max_tokens and max_completion_tokens differ {both}: send one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: send logprobs=true, or leave it out")
        return self

    @property
    def alternatives(self) -> int | None:
        """Likely tokens to name beside each token; None: no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def schema_wanted(self) -> Mapping[str, Any] | None:
        """JSON schema that the answer has to follow."""
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.wanted
        return {"type": "object"} if isinstance(self.response_format, JsonObjectFormat) else None

    @property
    def count(self) -> int:
        """Most tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens or 512


class CompletionRequest(_Generation):
    """Body of ``/v1/completions``."""

    prompt: Text
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def count(self) -> int:
        """Most tokens of the answer; the default is OpenAI's."""
        return self.max_tokens or 16


_ALLOWED: dict[str, type[BaseModel]] = {
    "messages": Message,
    "content": TextPart,
    "image_url": ImageUrl,
    "stream_options": StreamOptions,
    "json_schema": JsonSchema,
    "response_format": JsonSchemaFormat,
}


def explain(error: Mapping[str, Any], model: type[BaseModel]) -> tuple[str, str | None]:
    """The message for one of pydantic's errors, and the parameter it is about.

    Args:
        error: of ``ValidationError.errors()``; its place starts with ``body``.
        model: what the body should have been.
    """
    place: Sequence[str | int] = error["loc"][1:]
    if error["type"] == "json_invalid":
        return "the body is not JSON: send a JSON object", None
    name = ".".join(str(part) for part in place) or None
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        owner = next((_ALLOWED[str(part)] for part in reversed(place[:-1]) if str(part) in _ALLOWED), model)
        allowed = ", ".join(field.alias or key for key, field in owner.model_fields.items())
        return f"{name} is not supported: leave it out; allowed are {allowed}", name
    if name is None:
        return message, None
    if error["type"] == "missing":
        return f"{name} is missing", name
    return f"{name} is {_short(error.get('input'))}: {message}", name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
