"""How the command line reads the values of options."""

from __future__ import annotations

from typing import Any

__all__ = ["whole"]


def whole(_: Any, tokens: Any) -> int:
    """An integer as typed, a converter for cyclopts, which would round 2.5."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not an integer") from None
