"""Frozen configurations: pydantic models that refuse unknown fields, and their content digest."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from commissure.core.errors import InputError

__all__ = ["Config"]

SomeConfig = TypeVar("SomeConfig", bound="Config")  # not Self: type checking at run time works method by method


class Config(BaseModel):
    """Base of every configuration; ranges are declared with `pydantic.Field`.

    A bad field raises `InputError` that names the field, its value and the allowed range.

    >>> from pydantic import Field
    >>> class Training(Config):
    ...     lr: float = Field(default=1e-3, gt=0)
    >>> Training(lr=-1.0)
    Traceback (most recent call last):
    commissure.core.errors.InputError: Training.lr = -1.0: expected input should be greater than 0
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise _as_input_error(type(self), error) from None

    @classmethod
    def from_json(cls: type[SomeConfig], text: str) -> SomeConfig:
        """Read a configuration from JSON; a bad field raises `InputError`."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise _as_input_error(cls, error) from None

    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON: equal configurations have equal digests on every machine."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def _as_input_error(kind: type[BaseModel], error: ValidationError) -> InputError:
    first = error.errors(include_url=False)[0]
    location = [kind.__name__, *map(str, first["loc"])]
    nested = first.get("ctx", {}).get("error")
    if isinstance(nested, InputError):  # raised by a Config inside this one: its message, with the path from here
        location += [part for part in nested.argument.split(".") if not part[:1].isupper()]
        return InputError(".".join(location), nested.value, nested.allowed, nested.fix)
    if first["type"] != "extra_forbidden":
        return InputError(".".join(location), first["input"], first["msg"][0].lower() + first["msg"][1:])
    fields = f", but one of {', '.join(kind.model_fields)}" if len(first["loc"]) == 1 else ""
    return InputError(
        ".".join(location), first["input"], f"no field of this name{fields}", "remove it or correct its name"
    )
