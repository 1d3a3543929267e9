"""Models of Hugging Face by name: what is looked at by default is what a head is given, and outlines cost nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from commissure.core.errors import InputError
from commissure.geometry.pretrained import PretrainedCheckpoints, default_sites
from commissure.geometry.tracing import resolve

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
# Family, its settings, and the sites a reader of its code would name.
FAMILIES: tuple[tuple[str, dict[str, Any], list[str]], ...] = (
    ("gpt2", {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20}, ["h.0", "h.1", "ln_f"]),
    ("llama", {**SMALL, "intermediate_size": 8, "num_key_value_heads": 2}, ["layers.0", "layers.1", "norm"]),
    ("gpt_neox", {**SMALL, "intermediate_size": 8}, ["layers.0", "layers.1", "final_layer_norm"]),
    ("bloom", {"hidden_size": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20}, ["h.0", "h.1", "ln_f"]),
    ("opt", {**SMALL, "ffn_dim": 8, "word_embed_proj_dim": 8},
     ["decoder.layers.0", "decoder.layers.1", "decoder.final_layer_norm"]),
    ("bert", {**SMALL, "intermediate_size": 8}, ["encoder.layer.0", "encoder.layer.1"]),
    ("distilbert", {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 8, "vocab_size": 20},
     ["transformer.layer.0", "transformer.layer.1"]),
    ("mixtral", {**SMALL, "intermediate_size": 8, "num_key_value_heads": 2, "num_local_experts": 2},
     ["layers.0", "layers.1", "norm"]),
)  # fmt: skip


@pytest.mark.parametrize(("family", "settings", "expected"), FAMILIES, ids=[one[0] for one in FAMILIES])
def test_default_sites_and_outlines(family: str, settings: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **settings))
    assert resolve(model, default_sites(model)) == expected
    model.save_pretrained(tmp_path)
    load = PretrainedCheckpoints(str(tmp_path))
    outline, loaded = load.outline("."), load(".")
    assert [name for name, _ in outline.named_modules()] == [name for name, _ in loaded.named_modules()]
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_lists_inside_blocks_are_not_sites() -> None:
    block = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)]), "norm": nn.LayerNorm(2)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block]), "norm": nn.RMSNorm(2)})
    assert default_sites(model) == ("layers.*", "norm")


def test_a_model_without_blocks_needs_sites() -> None:
    with pytest.raises(InputError, match="sites"):
        default_sites(nn.Sequential(nn.Linear(2, 2)))


def test_a_revision_may_leave_the_tokenizer_to_the_folder_above(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    load = PretrainedCheckpoints(str(tmp_path))

    def save(folder: Path, size: int) -> None:
        words = tokenizers.models.WordLevel({**{str(i): i for i in range(size - 1)}, "?": size - 1}, "?")
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(words), unk_token="?"
        ).save_pretrained(folder)

    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="tokenizer"):
        load.tokenizer("a")
    save(tmp_path, 7)
    assert len(load.tokenizer("a")) == 7
    save(tmp_path / "a", 9)
    assert len(load.tokenizer("a")) == 9
    with pytest.raises(InputError, match=r"revision = 'b'"):
        load.tokenizer("b")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("gpt2", **FAMILIES[0][1]))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        PretrainedCheckpoints(str(tmp_path))(".")


def test_a_branch_of_a_hub_that_moves_is_another_checkpoint(tmp_path: Path) -> None:
    model = tmp_path / "models--someone--small"
    commits = "a" * 40, "b" * 40
    for commit in commits:
        config = transformers.AutoConfig.for_model("gpt2", **FAMILIES[0][1])
        config.save_pretrained(model / "snapshots" / commit)
    (model / "refs").mkdir()

    def identity(revision: str) -> str:
        """In a process of its own: the hub's client reads where its files are when it is imported."""
        code = (
            "from commissure.geometry.pretrained import PretrainedCheckpoints\n"
            f"print(PretrainedCheckpoints('someone/small').identity({revision!r}))"
        )
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True, timeout=120
        ).stdout.strip()

    for commit in commits:
        (model / "refs" / "main").write_text(commit)
        assert identity("main") == f"someone/small@{commit}"
    assert identity(commits[0]) == f"someone/small@{commits[0]}"
