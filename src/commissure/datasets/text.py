"""Text to model: the validation and test parts of WikiText-2, and one that needs no network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from commissure.core.errors import InputError
from commissure.datasets.fetching import fetch

__all__ = ["Text", "python_topics", "wikitext2"]


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


def python_topics() -> Text:
    """English prose that every Python brings along: the language reference behind `help()`, about half a megabyte.

    >>> python_topics().text[:22]
    'The "assert" statement'
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return Text("topics", text, np.frombuffer(text.encode(), np.uint8))
