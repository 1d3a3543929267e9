"""The trained parts of a Monte Carlo predictor as files: a SoftPrefix, a FactorPosterior or a LatentFlow on a Stack.

Weights as safetensors; what each part was made with, its Stack included, in the metadata.  A part is whole in its file:
two that shared one Stack have a copy each when loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from commissure.core.errors import InputError
from commissure.core.files import read_tensors, replacing
from commissure.core.rng import isolated
from commissure.metahmm.conditional import FactorEmbedding, SoftPrefix
from commissure.metahmm.samplers import FactorPosterior, LatentFlow
from commissure.nn.stack import Stack, StackConfig

__all__ = ["load_part", "save_part"]

Part = SoftPrefix | FactorPosterior | LatentFlow
_FORMAT = "commissure.metahmm."


def save_part(part: Part, path: str | Path) -> None:
    """Write one file, replaced in one step.

    Raises `InputError` for a part on a model that is not a Stack of named mixers (keep its state_dict instead).

    >>> import tempfile
    >>> part = FactorPosterior(Stack(["gru"], 8, vocab=5), (4, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_part(part, Path(folder) / "posterior.safetensors")
    ...     load_part(Path(folder) / "posterior.safetensors").factor_sizes
    (4, 2)
    """
    from safetensors.torch import save_file

    if not isinstance(part, Part):
        raise InputError("part", type(part).__name__, "a SoftPrefix, FactorPosterior or LatentFlow")
    lm = part.lm
    if not isinstance(lm, Stack) or None in lm.config.mixers:
        raise InputError("part.lm", type(lm).__name__, "a Stack whose mixers are named", "keep its state_dict instead")
    metadata = {
        "format": _FORMAT + type(part).__name__,
        "stack": lm.config.model_dump_json(),
        "sizes": json.dumps(_sizes(part)),
    }
    weights = {name: t.detach().cpu().contiguous() for name, t in part.state_dict().items()}
    with replacing(path) as partial:
        save_file(weights, partial, metadata=metadata)


def load_part(path: str | Path) -> Part:
    """Read a file of `save_part`, in evaluation mode; `InputError` for another or a damaged one."""
    metadata, weights = read_tensors(path)
    kinds = {_FORMAT + kind.__name__: kind for kind in (SoftPrefix, FactorPosterior, LatentFlow)}
    if metadata.get("format") not in kinds:
        raise InputError("path", str(path), "a file written by save_part", "Stack.load and Trained.load read others")
    config = StackConfig.from_json(metadata.get("stack", ""))
    try:
        sizes = json.loads(metadata.get("sizes", ""))
        with isolated(0, "load"):  # the weights drawn here are replaced below
            lm = Stack(config.mixers, **config.model_dump(exclude={"mixers"}))  # type: ignore[arg-type]
            part = _make(kinds[metadata["format"]], lm, sizes)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError("path", str(path), "the metadata of a whole file", str(error)) from None
    shapes = {name: t.shape for name, t in part.state_dict().items()}
    if shapes != {name: t.shape for name, t in weights.items()} or not all(
        bool(t.isfinite().all()) for t in weights.values()
    ):
        raise InputError("path", str(path), "the finite weights of its configuration", "the file is damaged")
    part.load_state_dict(weights, assign=True)
    return part.eval()


def _sizes(part: Part) -> dict[str, Any]:
    """The arguments after `lm`."""
    if isinstance(part, SoftPrefix):
        factors = None if part.embedding is None else part.embedding.sizes.tolist()
        return {"code_dim": part.code_dim, "factor_sizes": factors, "every_token": part.every_token}
    if isinstance(part, FactorPosterior):
        return {"factor_sizes": part.factor_sizes}
    width = part.base[0].out_features
    return {"code_dim": part.code_dim, "layers": len(part.couplings), "components": part.components, "width": width}


def _make(kind: type[nn.Module], lm: Stack, sizes: dict[str, Any]) -> Part:
    if kind is SoftPrefix:
        factors, code_dim = sizes["factor_sizes"], sizes["code_dim"]
        embedding = None if factors is None else FactorEmbedding(factors, code_dim)
        return SoftPrefix(lm, code_dim, embedding=embedding, every_token=sizes["every_token"])
    if kind is FactorPosterior:
        return FactorPosterior(lm, sizes["factor_sizes"])
    return LatentFlow(lm, **sizes)
