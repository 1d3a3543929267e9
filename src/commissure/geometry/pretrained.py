"""Models and texts in the form that `CheckpointSweep` and `trace` take: Hugging Face's, safetensors alone.

    load = PretrainedCheckpoints("EleutherAI/pythia-160m")     load("step4000")       revisions of a hub's model
    load = PretrainedCheckpoints("runs/my-model")              load("checkpoint-500") folders below a folder
    batches = text_batches(texts, tokenizer, max_length=128)

The model is the body without a head: its last norm's output is what a head would see.  Weights that are only there as
pickle are refused.  `load.outline(revision)` has the modules without weights, `default_sites` names those to look at.
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

__all__ = ["PretrainedCheckpoints", "default_sites", "text_batches"]

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


@dataclass(frozen=True)
class PretrainedCheckpoints:
    """Loads a revision of `source`: a hub's name, or a folder whose subfolders ("." for itself) are the revisions.

    >>> PretrainedCheckpoints("EleutherAI/pythia-160m").source
    'EleutherAI/pythia-160m'
    """

    source: str
    dtype: torch.dtype = torch.float32

    def __call__(self, revision: str) -> nn.Module:
        """The model, in evaluation mode."""
        place, options = self._place(revision)
        auto = _transformers("loading a model").AutoModel
        return auto.from_pretrained(place, dtype=self.dtype, use_safetensors=True, **options).eval()

    def outline(self, revision: str) -> nn.Module:
        """The model without its weights, on the device "meta": modules and their names, at no cost."""
        place, options = self._place(revision)
        transformers = _transformers("loading a model")
        config = transformers.AutoConfig.from_pretrained(place, **options)
        with torch.device("meta"):
            return transformers.AutoModel.from_config(config)

    def tokenizer(self, revision: str) -> Any:
        """The revision's tokenizer, or where its folder has none that of the folder above it."""
        place, options = self._place(revision)
        if self._folder(revision) is not None:
            folders = [folder for folder in (Path(place), Path(self.source)) if _has_tokenizer(folder)]
            if not folders:
                raise InputError("model", self.source, "a folder with a tokenizer", "tokenizer.save_pretrained(folder)")
            place = str(folders[0])
        return _transformers("a model's tokenizer").AutoTokenizer.from_pretrained(place, **options)

    def identity(self, revision: str) -> str:
        """At a hub the commit that the revision stands for now; of a folder the digest of its files."""
        folder = self._folder(revision)
        if folder is None:
            _transformers("a model's revision")
            from huggingface_hub import hf_hub_download  # transformers needs it

            config = hf_hub_download(self.source, "config.json", revision=revision)
            return f"{self.source}@{Path(config).parent.name}"  # .../snapshots/COMMIT/config.json
        digest = hashlib.sha256()
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()

    def _place(self, revision: str) -> tuple[str, dict[str, Any]]:
        """Where it is, and how it is to be read: no code of others runs."""
        folder = self._folder(revision)
        if folder is None:
            return self.source, {"revision": revision, "trust_remote_code": False}
        return str(folder), {"local_files_only": True, "trust_remote_code": False}

    def _folder(self, revision: str) -> Path | None:
        """None where the source is not a folder."""
        if not Path(self.source).is_dir():
            return None
        folder = Path(self.source) / revision
        if not folder.is_dir():
            known = sorted(path.parent.name for path in Path(self.source).glob("*/config.json"))
            raise InputError("revision", revision, f"a folder in {self.source}: {', '.join(known) or 'none'}")
        return folder


def default_sites(model: nn.Module) -> tuple[str, ...]:
    """The outermost lists of blocks and the norms beside them, as patterns; a model without is an InputError.

    >>> class Body(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.blocks, self.ln_f = nn.ModuleList([nn.Linear(2, 2)]), nn.LayerNorm(2)
    >>> default_sites(Body())
    ('blocks.*', 'ln_f')
    """
    modules = dict(model.named_modules())
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise InputError("sites", (), f"names or patterns of modules: {', '.join(list(modules)[1:6])}, ...")
    parents = dict.fromkeys(name.rpartition(".")[0] for name in outer)
    norms = [
        f"{parent}.{name}" if parent else name
        for parent in parents
        for name, module in modules[parent].named_children()
        if "norm" in type(module).__name__.lower() and "embed" not in name  # norms of embeddings come first
    ]
    return (*(f"{name}.*" for name in outer), *norms)


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


def _transformers(purpose: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BackendMissing("transformers", "hf", purpose) from error
    return transformers


def _has_tokenizer(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in _TOKENIZER_FILES)
