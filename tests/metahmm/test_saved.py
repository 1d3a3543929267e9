"""Files of the trained parts: what comes back predicts the same, bit for bit; what is not one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from commissure.core.errors import InputError
from commissure.core.files import read_tensors
from commissure.core.rng import isolated, torch_generator
from commissure.metahmm.conditional import FactorEmbedding, SoftPrefix
from commissure.metahmm.samplers import FactorPosterior, LatentFlow
from commissure.metahmm.saved import Part, load_part, save_part
from commissure.nn import Stack

TOKENS = torch.randint(7, (3, 6), generator=torch_generator(0, "tokens"))


def stack() -> Stack:
    return Stack(["gru", "attention"], 16, vocab=7, heads=2, positions="rotary")


PARTS: dict[str, Any] = {
    "vectors": lambda: SoftPrefix(stack(), 3),
    "factors": lambda: SoftPrefix(stack(), 3, embedding=FactorEmbedding((4, 2), 3)),
    "told at every token": lambda: SoftPrefix(stack(), 3, every_token=True),
    "posterior": lambda: FactorPosterior(stack(), (4, 2)),
    "flow": lambda: LatentFlow(stack(), 5, layers=3, components=2, width=9),
    "float64": lambda: LatentFlow(stack(), 5).double(),
}


def part(name: str) -> Part:
    """Nothing is left as it was made."""
    with isolated(0, name):
        made = PARTS[name]()
        with torch.no_grad():
            for tensor in (*made.parameters(), *(b for b in made.buffers() if b.dtype.is_floating_point)):
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    return made


def output(model: Part) -> torch.Tensor:
    if isinstance(model, SoftPrefix):
        codes = torch.tensor([[3, 1]]) if model.embedding is not None else torch.tensor([[0.5, -1.0, 2.0]])
        return model.log_probs(TOKENS, codes.expand(3, 1, -1))
    codes = torch.tensor([[3, 1]] * 3) if isinstance(model, FactorPosterior) else torch.linspace(0, 1, 15).view(3, 5)
    return model.loss(TOKENS, codes.to(next(model.parameters()).dtype) if isinstance(model, LatentFlow) else codes)


@pytest.mark.parametrize("name", PARTS)
def test_what_comes_back_is_the_same(name: str, tmp_path: Path) -> None:
    saved = part(name).eval()
    save_part(saved, tmp_path / "part")
    before = torch.random.get_rng_state()
    loaded = load_part(tmp_path / "part")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(loaded) is type(saved)
    assert not loaded.training
    assert torch.equal(output(loaded), output(saved))
    for (one, p), (other, q) in zip(saved.named_parameters(), loaded.named_parameters(), strict=True):
        assert (one, p.dtype, p.requires_grad) == (other, q.dtype, q.requires_grad)


def test_other_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "part"
    with pytest.raises(InputError, match="existing file"):
        load_part(path)
    stack().save(path)
    with pytest.raises(InputError, match="save_part"):
        load_part(path)
    save_part(part("flow"), path)
    metadata, weights = read_tensors(path)[0], load_file(path)
    for name, value in {
        "sizes": "{",
        "stack": "{}",
    }.items():
        save_file(weights, path, metadata=metadata | {name: value})
        with pytest.raises(InputError):
            load_part(path)
    for sizes in ({"code_dim": 5, "depth": 3}, {"code_dim": 1}):
        save_file(weights, path, metadata=metadata | {"sizes": json.dumps(sizes)})
        with pytest.raises(InputError):
            load_part(path)
    save_file(weights, path, metadata=metadata | {"sizes": json.dumps({"code_dim": 6, "layers": 3})})
    with pytest.raises(InputError, match="weights of its configuration"):
        load_part(path)
    save_file(weights | {"mean": weights["mean"] * torch.nan}, path, metadata=metadata)
    with pytest.raises(InputError, match="finite"):
        load_part(path)


def test_only_named_stacks_are_saved(tmp_path: Path) -> None:
    from commissure.nn.names import MIXERS

    class Other(nn.Module):
        pass

    with isolated(0, "parts"):
        unnamed = SoftPrefix(Stack([lambda dim: MIXERS["gru"](dim)], 8, vocab=5), 3)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"part\.lm"):
        save_part(unnamed, tmp_path / "part")
    with pytest.raises(InputError, match="part"):
        save_part(stack(), tmp_path / "part")  # type: ignore[arg-type]
    foreign = part("vectors")
    foreign.lm = Other()
    with pytest.raises(InputError, match=r"part\.lm"):
        save_part(foreign, tmp_path / "part")
    assert not (tmp_path / "part").exists()
