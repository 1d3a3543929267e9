"""MesaNet's configuration: the published sizes, the initialization's statistics, bad fields."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from commissure.core.errors import InputError
from commissure.core.rng import isolated
from commissure.mesa.config import MesaNetConfig, build_stack
from commissure.nn.convolution import ShortConvolution
from commissure.nn.stack import Stack


def on_meta(config: MesaNetConfig) -> Stack:
    with torch.device("meta"):
        return build_stack(config)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def expected_parameters(config: MesaNetConfig) -> int:
    """By hand, from the paper's description."""
    d, inner = config.dim, config.heads * config.head_dim
    projections = 4 * d * inner
    convolutions = 2 * 4 * inner
    gates = 2 * config.heads * (d + 1)
    mesa = projections + convolutions + gates + inner + config.head_dim  # Lambda; norm of the heads
    return config.vocab * d + config.blocks * (mesa + 3 * d * 3 * d + 2 * d) + d


@pytest.mark.parametrize(("name", "millions"), [("140m", 140), ("440m", 440), ("940m", 940)])
def test_presets_have_the_published_size(name: str, millions: int) -> None:
    config = MesaNetConfig.from_preset(name)
    parameters = count(on_meta(config))
    assert parameters == expected_parameters(config)
    assert abs(parameters / (millions * 1e6) - 1) < 0.05


@pytest.mark.parametrize("name", ["140m", "440m", "940m"])
def test_hawk_alternates(name: str) -> None:
    stack = on_meta(MesaNetConfig.from_preset(name, hybrid="hawk"))
    kinds = [type(block.mixer).__name__ for block in stack.blocks]
    assert kinds == ["RGLRU", "MesaLayer"] * (len(kinds) // 2)
    assert {block.mixer.inner / stack.dim for block in stack.blocks if type(block.mixer).__name__ == "RGLRU"} == {1.25}
    assert {block.mixer.a_proj.blocks for block in stack.blocks if type(block.mixer).__name__ == "RGLRU"} == {16}


@pytest.mark.parametrize("name", ["140m", "440m", "940m"])
def test_a_hybrid_has_as_many_parameters(name: str) -> None:
    """Block by block, so that the embedding cannot hide a difference."""
    plain, hybrid = (on_meta(MesaNetConfig.from_preset(name, hybrid=kind)) for kind in (None, "hawk"))
    assert abs(count(hybrid.blocks) / count(plain.blocks) - 1) < 0.01


def test_the_block_is_the_papers() -> None:
    config = MesaNetConfig.from_preset("140m")
    stack = on_meta(config)
    assert stack.config.soft_cap == 30.0
    assert stack.config.tie
    assert stack.config.embed_scale == math.sqrt(768)
    assert stack.config.norm == "rms"
    assert not stack.config.start_token
    assert {block.mlp.down.in_features for block in stack.blocks} == {3 * 768}
    assert {block.mixer.inputs.head_dim for block in stack.blocks} == {128}
    assert {block.mixer.output.o_norm.eps for block in stack.blocks} == {config.head_norm_eps}


def test_weights_are_drawn_as_published() -> None:
    config = MesaNetConfig(vocab=900, dim=192, blocks=6, heads=2, head_dim=80, hybrid="hawk")
    with isolated(0, "init"):
        stack = build_stack(config).requires_grad_(False)
    writers = {"mlp.down", "mixer.output.o_proj", "mixer.out_proj"}
    seen = set()
    for block in stack.blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                gain = 2 / 6 if name in writers else 1.0
                seen |= writers & {name}
                deviation = module.weight.std() * math.sqrt(module.in_features / gain)
            elif isinstance(module, ShortConvolution):
                deviation = module.weight.std() * math.sqrt(module.width)
            else:
                continue
            slack = 4 / math.sqrt(2 * next(module.parameters()).numel())
            assert abs(float(deviation) - 1) < slack, name
            assert abs(float(module.weight.mean() / module.weight.std())) < 4 / math.sqrt(module.weight.numel()), name
    assert seen == writers
    assert abs(float(stack.embedding.std()) * math.sqrt(192) - 1) < 0.02
    mesa = stack.blocks[1].mixer
    x = torch.zeros(1, 2, 192)
    _, _, _, g, beta, lamb, _ = mesa.project(x, None, None)
    torch.testing.assert_close(lamb, torch.ones_like(lamb))  # Lambda starts at 1
    torch.testing.assert_close(beta, torch.full_like(beta, 0.5))
    cap = 1 - (1 - 0.9975) * 0.25
    torch.testing.assert_close(g.exp(), torch.full_like(g, cap / (1 + math.exp(-4.0))))


def test_options_reach_the_layers() -> None:
    config = MesaNetConfig(
        vocab=11, dim=8, blocks=2, heads=2, head_dim=4, conv_size=2, lambda_lower_bound=0.01, forget_cap=None,
        solver="cg", max_cg_steps=7, cg_eps=1e-3, cg_init="zero", tie=False, soft_cap=None, scale_embeddings=False,
    )  # fmt: skip
    stack = build_stack(config)
    for block in stack.blocks:
        layer = block.mixer
        assert (layer.solver, layer.max_cg_steps, layer.cg_eps, layer.cg_init) == ("cg", 7, 1e-3, "zero")
        assert layer.inputs.conv_size == 2
        assert layer.lambda_lower_bound == 0.01
        assert layer.forget_cap is None
    assert stack.config.embed_scale == 1.0
    assert stack.config.soft_cap is None
    assert stack.head.shape == (11, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 0}, "MesaNetConfig.dim = 0"),
        ({"hybrid": "mamba"}, "MesaNetConfig.hybrid"),
        ({"vocab": 100, "bos_token_id": 100}, "MesaNetConfig.bos_token_id = 100: expected a token below vocab = 100"),
        ({"forget_cap": 1.5}, "MesaNetConfig.forget_cap = 1.5"),
        ({"solver": "lu"}, "MesaNetConfig.solver = 'lu'"),
        ({"layers": 3}, "MesaNetConfig.layers = 3: expected no field of this name"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        MesaNetConfig(**fields)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="one of 140m, 440m, 940m"):
        MesaNetConfig.from_preset("1b")


def test_dir_lists_the_names_that_load_on_first_use() -> None:
    import commissure.mesa

    assert set(commissure.mesa.__all__) <= set(dir(commissure.mesa))
