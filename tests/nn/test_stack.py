"""Stack: prior, causality, streaming on tokens, positions, and checkpoints."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from commissure.core.errors import InputError
from commissure.core.mixer import SequenceMixer, select
from commissure.nn import GRU, Stack, mixer
from commissure.nn.decay import exempted

ALL = ["attention", "gru", "s4d", "mamba"]


def make(mixers=ALL, **sizes):
    torch.manual_seed(0)
    return Stack(mixers, 8, **{"vocab": 7, "heads": 2, **sizes}).double()


def tokens(batch=3, time=10):
    return torch.randint(7, (batch, time), generator=torch.Generator().manual_seed(1))


VARIANTS = [
    {},
    {"positions": "rotary", "mlp": "swiglu", "mlp_ratio": 3.0},
    {"positions": 12, "norm": "layer"},
    {"tie": True, "embed_scale": math.sqrt(8), "soft_cap": 30.0},
    {"mlp": "none", "norm": "none"},
]


@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
def test_log_probs_are_distributions_and_begin_with_the_prior(sizes):
    model = make(**sizes)
    log_probs = model.log_probs(tokens())
    assert log_probs.shape == (3, 11, 7)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, 11, dtype=torch.float64))
    torch.testing.assert_close(log_probs[:, 0], model.prior(3))
    torch.testing.assert_close(model.log_probs(tokens(time=0)), model.prior(3)[:, None])


@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
def test_streaming_tokens_gives_the_same_log_probs(sizes):
    model, state, x = make(**sizes), make(**sizes).init_state(3), tokens()
    expected = model.log_probs(x)[:, 1:]
    for t in range(x.shape[1]):
        log_probs, state = model.step(x[:, t], state)
        torch.testing.assert_close(log_probs, expected[:, t], rtol=0, atol=1e-10)
    first, middle = model(x[:, :4])
    second, last = model(x[:, 4:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=0, atol=1e-10)
    assert torch.equal(last.position, state.position)


def test_log_probs_are_causal():
    model, x = make(), tokens()
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 7
    torch.testing.assert_close(model.log_probs(changed)[:, :7], model.log_probs(x)[:, :7], rtol=0, atol=1e-12)
    assert not torch.allclose(model.log_probs(changed)[:, 7:], model.log_probs(x)[:, 7:])


def test_ragged_tokens_and_selected_rows():
    model, x, lengths = make(), tokens(), torch.tensor([4, 0, 10])
    x[0, 4:] = -100
    log_probs, state = model(x, lengths=lengths)
    alone, own = model(x[:1, :4])
    torch.testing.assert_close(log_probs[:1, :4], alone, rtol=0, atol=1e-10)
    next_token = torch.tensor([2])
    chosen, _ = model.step(next_token, select(state, torch.tensor([0])))
    torch.testing.assert_close(chosen, model.step(next_token, own)[0], rtol=0, atol=1e-10)


def test_the_start_vector_and_the_prior_can_be_learned():
    model = make(["gru"])
    (-model.log_probs(tokens(time=0))[:, 0, 3].mean()).backward()
    assert float(model.start.grad.abs().sum()) > 0


def test_soft_cap_bounds_logits_and_keeps_small_ones():
    model, free = make(soft_cap=2.0), make()
    h = 50 * torch.randn(4, 8, dtype=torch.float64)
    assert float(model.logits(h).detach().abs().max()) <= 2
    torch.testing.assert_close(model.logits(1e-4 * h), free.logits(1e-4 * h), rtol=1e-4, atol=1e-9)


def test_tied_output_shares_the_embedding():
    tied, free = make(tie=True), make()
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == 7 * 8


def test_initial_predictions_are_near_uniform():
    torch.manual_seed(0)
    model = Stack(["attention"] * 4, 64, vocab=50, positions="rotary")
    log_probs = model.log_probs(torch.randint(50, (4, 30))).detach()
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    assert float(entropy.mean()) > 0.75 * math.log(50)


def test_backbone_is_a_mixer_that_fits_in_a_stack():
    backbone = make(["gru"], vocab=None)
    assert isinstance(backbone, SequenceMixer)
    outer = Stack([lambda dim: Stack(["s4d", "gru"], dim), "mamba"], 8).double()
    y, state = outer(torch.randn(2, 5, 8, dtype=torch.float64))
    assert y.shape == (2, 5, 8)
    assert state.blocks[0].blocks[1].hidden.shape == (2, 8)
    with pytest.raises(InputError, match="backbone"):
        backbone.embed(tokens())


def test_without_a_start_token_there_is_no_prior():
    model = make(["gru"], start_token=False)
    assert model(tokens())[0].shape == (3, 10, 7)
    assert model.init_state(3).position.tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="start_token"):
        model.log_probs(tokens())
    with pytest.raises(InputError, match="start_token"):
        model.prior(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
def test_checkpoint_round_trip_is_bit_identical(tmp_path, sizes, dtype):
    model = make(**sizes).to(dtype)
    model.save(tmp_path / "model.safetensors")
    before = torch.random.get_rng_state()
    loaded = Stack.load(tmp_path / "model.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loaded.config == model.config
    assert torch.equal(loaded.log_probs(tokens()), model.log_probs(tokens()))
    assert all(p.requires_grad and p.dtype == dtype for p in loaded.parameters())


def test_a_checkpoint_stores_names_only_and_asks_for_the_factory(tmp_path):
    path = tmp_path / "model.safetensors"
    model = make([lambda dim: GRU(dim), "s4d"])
    model.save(path)
    with pytest.raises(InputError, match=r"load\(path, mixer=factory\)"):
        Stack.load(path)
    assert torch.equal(Stack.load(path, mixer=GRU).log_probs(tokens()), model.log_probs(tokens()))


def test_what_is_exempt_from_weight_decay_stays_so_when_loaded(tmp_path):
    model = make(["mesa", "gru"])
    model.save(tmp_path / "model.safetensors")
    loaded = Stack.load(tmp_path / "model.safetensors")
    assert exempted(loaded) == exempted(model) == {"blocks.0.mixer.lambda_params"}


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, model = tmp_path / "model.safetensors", make(["gru"])
    model.save(path)
    before = path.read_bytes()

    def fail(weights, target, metadata):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="existing folder"):
        model.save(tmp_path / "absent" / "model.safetensors")


def rewrite(path, change_weights=None, change_config=None, metadata=True):
    model = make(["gru"])
    model.save(path)
    weights, config = load_file(path), json.loads(model.config.model_dump_json())
    (change_weights or (lambda w: None))(weights)
    (change_config or (lambda c: None))(config)
    saved = {"format": "commissure.nn.Stack", "config": json.dumps(config)} if metadata else None
    save_file(weights, path, metadata=saved)


DAMAGE = {
    "missing tensor": ({"change_weights": lambda w: w.pop("head")}, "missing"),
    "extra tensor": ({"change_weights": lambda w: w.update(extra=torch.zeros(1))}, "extra"),
    "wrong shape": ({"change_weights": lambda w: w.update(head=torch.zeros(2, 2))}, r"shape \(7, 8\)"),
    "not finite": ({"change_weights": lambda w: w["head"].fill_(math.nan)}, "finite"),
    "no metadata": ({"metadata": False}, "Stack.save"),
    "unknown mixer": ({"change_config": lambda c: c.update(mixers=["lstm"])}, "attention, .*gru, mamba, .*s4d"),
    "unknown field": ({"change_config": lambda c: c.update(depth=3)}, "depth"),
    "bad value": ({"change_config": lambda c: c.update(dim=-1)}, "dim"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_bad_checkpoints_are_refused(tmp_path, damage, message):
    path = tmp_path / "model.safetensors"
    rewrite(path, **damage)
    with pytest.raises(InputError, match=message):
        Stack.load(path)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(InputError, match="existing file"):
        Stack.load(tmp_path / "absent.safetensors")
    (tmp_path / "model.pt").write_bytes(b"\x80\x04junk that is no safetensors file")
    with pytest.raises(InputError, match="safetensors"):
        Stack.load(tmp_path / "model.pt")


BAD_SIZES = [
    {"mixers": "gru"},
    {"mixers": []},
    {"mixers": ["lstm"]},
    {"mixers": [lambda dim: torch.nn.Linear(dim, dim)]},
    {"vocab": 0},
    {"mlp": "relu"},
    {"norm": "batch"},
    {"positions": "sine"},
    {"positions": 0},
    {"positions": True},
    {"mixers": ["gru"], "positions": "rotary"},
    {"vocab": None, "tie": True},
    {"vocab": None, "soft_cap": 30.0},
    {"soft_cap": -1.0},
    {"mlp_ratio": 0.0},
]


@pytest.mark.parametrize("sizes", BAD_SIZES, ids=range(len(BAD_SIZES)))
def test_impossible_configurations_are_refused(sizes):
    with pytest.raises(InputError):
        make(**sizes)


def test_bad_tokens_are_refused():
    model = make(["gru"])
    for bad in (torch.tensor([[0, 7]]), torch.tensor([[-1]]), torch.tensor([1, 2]), torch.zeros(1, 2)):
        with pytest.raises(InputError, match="tokens"):
            model.log_probs(bad)
    with pytest.raises(InputError, match=r"\(batch,\)"):
        model.step(torch.zeros(1, 1, dtype=torch.int64), model.init_state(1))
    with pytest.raises(InputError, match="rows"):
        model.step(torch.zeros(2, dtype=torch.int64), model.init_state(1))


def test_the_learned_table_of_positions_ends():
    model = make(["gru"], positions=4)
    model.log_probs(tokens(time=3))
    with pytest.raises(InputError, match="table"):
        model.log_probs(tokens(time=4))


def test_mixer_by_name_or_factory():
    assert {name: type(mixer(name, 8)).__name__.lower() for name in ALL} == {name: name for name in ALL}
    assert mixer(lambda dim: GRU(dim, input_dim=2), 5).input_dim == 2
    with pytest.raises(InputError, match=r"attention, .*gru, mamba, .*s4d"):
        mixer("transformer", 8)
    with pytest.raises(InputError, match="SequenceMixer"):
        mixer(lambda dim: torch.nn.Linear(dim, dim), 8)
