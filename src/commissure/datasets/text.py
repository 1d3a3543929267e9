"""Text to model: the validation and test parts of WikiText-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from commissure.core.errors import InputError
from commissure.datasets.fetching import fetch

__all__ = ["Text", "wikitext2"]


@dataclass(frozen=True, eq=False)
class Text:
    """One split of a corpus; `utf8` are its bytes."""

    split: str
    text: str
    utf8: UInt8[np.ndarray, " n_bytes"]


def wikitext2(split: Literal["valid", "test"] = "valid") -> Text:
    """WikiText-2, word-level text with `<unk>`, one paragraph a line (arXiv:1609.07843); 1.1 and 1.3 MB."""
    if split not in ("valid", "test"):
        raise InputError("split", split, "'valid' or 'test'")
    content = fetch(f"wikitext-2/{split}.txt").read_bytes()
    return Text(split, content.decode("utf-8"), np.frombuffer(content, np.uint8))
