"""Frozen configurations: ranges, unknown fields, digests, JSON."""

from __future__ import annotations

import hashlib

import pytest
from pydantic import Field, ValidationError, model_validator

from commissure.core.config import Config
from commissure.core.errors import InputError


class Inner(Config):
    rate: float = Field(default=0.1, gt=0, lt=1)


class Outer(Config):
    steps: int = Field(default=10, ge=1)
    inner: Inner = Inner()
    names: tuple[str, ...] = ()


def test_frozen() -> None:
    config = Outer()
    with pytest.raises(ValidationError):
        config.steps = 3  # type: ignore[misc]
    assert config == Outer(steps=10)
    assert hash(config) == hash(Outer(steps=10))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, r"^Outer\.steps = 0: expected input should be greater than or equal to 1$"),
        ({"inner": {"rate": 2.0}}, r"^Outer\.inner\.rate = 2\.0: expected input should be less than 1$"),
        ({"names": ["a", 3]}, r"^Outer\.names\.1 = 3: expected input should be a valid string$"),
        (
            {"stepz": 3},
            r"^Outer\.stepz = 3: expected no field of this name, but one of steps, inner, names; remove it",
        ),
    ],
)
def test_bad_fields_name_themselves(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Outer(**fields)


def test_json_round_trip_and_bad_json() -> None:
    config = Outer(steps=3, inner=Inner(rate=0.25), names=("a",))
    assert Outer.from_json(config.model_dump_json()) == config
    with pytest.raises(InputError, match=r"Outer\.inner\.rate"):
        Outer.from_json('{"inner": {"rate": -1}}')
    with pytest.raises(InputError, match=r"Outer = .*invalid JSON"):
        Outer.from_json("{")


def test_digest_follows_the_content() -> None:
    assert Outer().digest() == Outer(steps=10, inner=Inner(rate=0.1)).digest()
    assert Outer().digest() != Outer(steps=11).digest()
    assert len(Outer().digest()) == 64


def test_digest_is_the_same_everywhere() -> None:
    """Run stores of other machines and versions hold it: the SHA-256 of the compact JSON in field order."""
    assert Inner().digest() == hashlib.sha256(b'{"rate":0.1}').hexdigest()
    assert Outer(names=("b",)).digest() == Outer(steps=10, names=("b",)).digest()


class Ordered(Config):
    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _check(self) -> Ordered:
        if self.low > self.high:
            raise InputError("low", self.low, f"a number <= high = {self.high}")
        return self


class Holder(Config):
    range: Ordered = Ordered()


def test_errors_of_validators_keep_their_argument() -> None:
    with pytest.raises(InputError, match=r"^Ordered\.low = 2\.0: expected a number <= high = 1\.0$"):
        Ordered(low=2.0)
    with pytest.raises(InputError, match=r"^Holder\.range\.low = 2\.0: expected a number <= high = 1\.0$"):
        Holder(range={"low": 2.0})
    assert Holder(range=Ordered(low=0.5)).range.low == 0.5
