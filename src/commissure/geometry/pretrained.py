"""Models and texts in the form that `CheckpointSweep` and `trace` take: Hugging Face's, safetensors alone.

    load = PretrainedCheckpoints("EleutherAI/pythia-160m")     load("step4000")       revisions of a hub's model
    load = PretrainedCheckpoints("runs/my-model")              load("checkpoint-500") folders below a folder
    batches = text_batches(texts, tokenizer, max_length=128)

The model is the body without a head: its last norm's output is what a head would see.  Weights that are only there as
pickle are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from commissure.core.errors import BackendMissing, InputError

__all__ = ["PretrainedCheckpoints", "text_batches"]


@dataclass(frozen=True)
class PretrainedCheckpoints:
    """Loads a revision of `source`: a hub's name, or a folder whose subfolders ("." for itself) are the revisions.

    >>> PretrainedCheckpoints("EleutherAI/pythia-160m").identity("step512")
    'EleutherAI/pythia-160m@step512'
    """

    source: str
    dtype: torch.dtype = torch.float32

    def __call__(self, revision: str) -> nn.Module:
        """The model, in evaluation mode."""
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise BackendMissing("transformers", "hf", "loading a model") from error
        options: dict[str, Any] = {"dtype": self.dtype, "use_safetensors": True, "trust_remote_code": False}
        folder = self._folder(revision)
        model = (
            AutoModel.from_pretrained(self.source, revision=revision, **options)
            if folder is None
            else AutoModel.from_pretrained(str(folder), local_files_only=True, **options)
        )
        return model.eval()

    def identity(self, revision: str) -> str:
        """The name at a hub, whose revisions stay; of a folder the digest of its files."""
        folder = self._folder(revision)
        if folder is None:
            return f"{self.source}@{revision}"
        digest = hashlib.sha256()
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()

    def _folder(self, revision: str) -> Path | None:
        """None where the source is not a folder."""
        if not Path(self.source).is_dir():
            return None
        folder = Path(self.source) / revision
        if not folder.is_dir():
            known = sorted(path.parent.name for path in Path(self.source).glob("*/config.json"))
            raise InputError("revision", revision, f"a folder in {self.source}: {', '.join(known) or 'none'}")
        return folder


def text_batches(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    n: int | None = None,
    min_length: int = 2,
    max_length: int = 128,
    batch_size: int = 32,
) -> list[dict[str, Int64[Tensor, "batch time"]]]:
    """`input_ids` and `attention_mask` of the first `n` texts with `min_length` tokens, cut at `max_length`.

    `tokenizer`: Hugging Face's.  Padded on the right, with the end token where it has no padding token.
    """
    if isinstance(texts, str):
        raise InputError("texts", "one text", "several", "pass text.splitlines()")
    least_values = {
        "min_length": (min_length, 1),
        "max_length": (max_length, min_length),
        "batch_size": (batch_size, 1),
    }
    for name, (value, least) in least_values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(name, value, f"an integer >= {least}")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise InputError("n", n, "an integer >= 1, or None for all")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if padding is None:
        raise InputError("tokenizer", type(tokenizer).__name__, "one with a padding or an end token")
    kept: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        if len(ids) >= min_length:
            kept.append(ids)
        if len(kept) == n:
            break
    if not kept:
        raise InputError("texts", 0, f"one text of {min_length} tokens at least")
    return [_padded(kept[i : i + batch_size], padding) for i in range(0, len(kept), batch_size)]


def _padded(rows: list[list[int]], padding: int) -> dict[str, Int64[Tensor, "batch time"]]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}
