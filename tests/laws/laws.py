"""The eight laws of a sequence mixer, as functions that hypothesis feeds with shapes, splits and lengths.

`hold(law, factory)` runs one law on the mixers a factory makes; a broken law raises AssertionError.  Everything is
float64 and held to 1e-10.  States are compared right-aligned: a cache may carry extra columns, if they are zeros.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from commissure.core.mixer import SequenceMixer, detach, map_state, scan, select, where

DIM = 6
TOLERANCE = 1e-10
EXAMPLES = 12
MAX_TIME = 11

Inputs = Callable[[torch.Generator, int, int, int], Tensor]


class Plan(NamedTuple):
    """What hypothesis draws, and prints when a law is broken."""

    batch: int
    time: int
    prefix: int
    seed: int
    cuts: list[int]
    lengths: list[int]
    index: list[int]


class Trial(NamedTuple):
    """A plan carried out: a mixer, a warm state (after `prefix` elements), inputs, and where to cut them."""

    mixer: SequenceMixer
    prefix: Tensor
    x: Tensor
    other: Tensor
    cuts: tuple[int, ...]
    lengths: Tensor
    index: Tensor
    seed: int

    def warm(self) -> Any:
        """The state after the prefix; None where it is empty, so that the default state is tried as well."""
        return detach(scan(self.mixer, self.prefix)[1]) if self.prefix.shape[1] else None


class Case(NamedTuple):
    """One mixer under the laws: its name, its factory (dim -> mixer in float64) and how to draw its inputs."""

    name: str
    factory: Callable[[int], Any]
    inputs: Inputs


def normal_inputs(generator: torch.Generator, batch: int, time: int, dim: int) -> Tensor:
    """Standard normal inputs."""
    return torch.randn(batch, time, dim, generator=generator, dtype=torch.float64)


def load(path: Path) -> ModuleType:
    """Import a file by its path: tests are no package, and an organ may be deleted with its cases."""
    spec = importlib.util.spec_from_file_location("_".join(path.with_suffix("").parts[-2:]), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def collect(tests: Path) -> Iterator[Case]:
    """The cases of every `tests/*/mixer_cases.py`: CASES, a list of (name, factory), and optionally INPUTS by name."""
    for path in sorted(tests.glob("*/mixer_cases.py")):
        module = load(path)
        inputs = getattr(module, "INPUTS", {})
        for name, factory in module.CASES:
            yield Case(name, factory, inputs.get(name, normal_inputs))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Batches of 1 to 3 rows, up to 11 elements after a prefix of up to 4, any cuts, any lengths, zero included."""
    batch, time, prefix = draw(st.integers(1, 3)), draw(st.integers(1, MAX_TIME)), draw(st.integers(0, 4))
    cuts = draw(st.lists(st.integers(0, time), max_size=4))
    lengths = draw(st.lists(st.integers(0, time), min_size=batch, max_size=batch))
    index = draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
    return Plan(batch, time, prefix, draw(st.integers(0, 2**31)), sorted(cuts), lengths, index)


def carry_out(plan: Plan, factory: Callable[[int], Any], inputs: Inputs) -> Trial:
    """The trial of a plan; the global generator is left as it was."""
    generator = torch.Generator().manual_seed(plan.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        mixer = factory(DIM)
    pieces = (inputs(generator, plan.batch, length, DIM) for length in (plan.prefix, plan.time, plan.time))
    return Trial(mixer, *pieces, tuple(plan.cuts), torch.tensor(plan.lengths), torch.tensor(plan.index), plan.seed)


def hold(
    law: Callable[[Trial], None],
    factory: Callable[[int], Any],
    inputs: Inputs = normal_inputs,
    *,
    shrink: bool = True,
) -> None:
    """Run `law` on drawn trials; an AssertionError tells the trial that breaks it, the smallest with `shrink`."""

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])],
    )
    @given(plan=plans())
    def check(plan: Plan) -> None:
        law(carry_out(plan, factory, inputs))

    check()


def tensors(state: Any) -> list[Tensor]:
    """The tensors of a State, in order."""
    return [state] if isinstance(state, Tensor) else [t for part in state for t in tensors(part)]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Equal shape, dtype and numbers (1e-10)."""
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def assert_same_state(actual: Any, expected: Any) -> None:
    """Equal States; where axis 1 differs in length, the longer one begins with zeros."""
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        if a.ndim > 1 and a.shape[1] != b.shape[1]:
            width = max(a.shape[1], b.shape[1])
            a, b = (torch.cat([t.new_zeros(len(t), width - t.shape[1], *t.shape[2:]), t], 1) for t in (a, b))
        assert_equal(a, b)


def forward_is_the_scan_of_step(trial: Trial) -> None:
    """Law 1, and neither touches its arguments."""
    state, x = trial.warm(), trial.x
    kept = x.clone(), None if state is None else map_state(Tensor.clone, state)
    y, _ = trial.mixer(x, state)
    assert_equal(y, scan(trial.mixer, x, state)[0])
    assert torch.equal(x, kept[0])
    if state is not None:
        assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(kept[1]), strict=True))


def any_chunking_gives_the_same(trial: Trial) -> None:
    """Law 2: cut anywhere, empty pieces included."""
    state = trial.warm()
    whole, last = trial.mixer(trial.x, state)
    outputs = []
    for start, stop in zip((0, *trial.cuts), (*trial.cuts, trial.x.shape[1]), strict=True):
        y, state = trial.mixer(trial.x[:, start:stop], state)
        outputs.append(y)
    assert_equal(torch.cat(outputs, 1), whole)
    assert_same_state(state, last)


def outputs_are_causal(trial: Trial) -> None:
    """Law 3: another future leaves the past alone."""
    state = trial.warm()
    y, _ = trial.mixer(trial.x, state)
    for cut in trial.cuts:
        changed, _ = trial.mixer(torch.cat([trial.x[:, :cut], trial.other[:, cut:]], 1), state)
        assert_equal(changed[:, :cut], y[:, :cut])


def final_states_are_equal(trial: Trial) -> None:
    """Law 4."""
    state = trial.warm()
    assert_same_state(trial.mixer(trial.x, state)[1], scan(trial.mixer, trial.x, state)[1])


def select_commutes_with_step(trial: Trial) -> None:
    """Law 5: choosing rows before or after, for a step and for a stretch."""
    state, index = scan(trial.mixer, torch.cat([trial.prefix, trial.other], 1))[1], trial.index
    y_t, after = trial.mixer.step(trial.x[:, 0], state)
    y_chosen, chosen = trial.mixer.step(trial.x[index, 0], select(state, index))
    assert_equal(y_chosen, y_t[index])
    assert_same_state(chosen, select(after, index))
    y, after = trial.mixer(trial.x, state, lengths=trial.lengths)
    y_chosen, chosen = trial.mixer(trial.x[index], select(state, index), lengths=trial.lengths[index])
    assert_equal(y_chosen, y[index])
    assert_same_state(chosen, select(after, index))


def gradients_are_those_of_the_scan(trial: Trial) -> None:
    """Law 6: with respect to inputs, initial state and parameters; of outputs and final state."""
    forward = _gradients(trial, trial.mixer)
    for a, b in zip(forward, _gradients(trial, lambda x, state: scan(trial.mixer, x, state)), strict=True):
        assert_equal(a, b)


def padding_changes_nothing(trial: Trial) -> None:
    """Law 7: rows alone and rows in a ragged batch, padding full of NaN, gradients of the parameters included."""
    state, lengths = trial.warm(), trial.lengths
    padding = torch.arange(trial.x.shape[1]) >= lengths[:, None]
    x = trial.x.masked_fill(padding[:, :, None], torch.nan)
    y, last = trial.mixer(x, state, lengths=lengths)
    ragged, alone = x.new_zeros(()), x.new_zeros(())
    for row, length in enumerate(lengths.tolist()):
        own = None if state is None else select(state, torch.tensor([row]))
        y_row, last_row = trial.mixer(trial.x[row : row + 1, :length], own)
        assert_equal(y[row : row + 1, :length], y_row)
        assert_same_state(select(last, torch.tensor([row])), last_row)
        ragged, alone = ragged + y[row, :length].square().sum(), alone + y_row.square().sum()
    parameters = [p for p in getattr(trial.mixer, "parameters", tuple)() if p.requires_grad]
    if parameters and ragged.requires_grad and int(lengths.max()):
        pairs = zip(_grad(ragged, parameters), _grad(alone, parameters), strict=True)
        for a, b in pairs:
            assert_equal(a, b)


def dtype_and_device_are_kept(trial: Trial) -> None:
    """Law 8: float32 and float64, every device there is, empty stretches, and rows chosen by a mask."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        for dtype in (torch.float32, torch.float64):
            mixer = trial.mixer.to(device=device, dtype=dtype)
            x = trial.x.to(device=device, dtype=dtype)
            y, state = mixer(x)
            y_t, stepped = mixer.step(x[:, 0], mixer.init_state(len(x)))
            empty, same = mixer(x[:, :0], state)
            assert empty.shape == (len(x), 0, y.shape[2])
            assert y_t.shape == (len(x), y.shape[2])
            assert_same_state(same, state)
            assert_same_state(where(torch.ones(len(x), dtype=torch.bool, device=device), state, state), state)
            default, given_ = mixer.init_state(len(x)), mixer.init_state(len(x), device=device, dtype=dtype)
            assert all(t.shape[0] == len(x) for s in (state, stepped, default, given_) for t in tensors(s))
            for t in (y, y_t, empty, *(t for s in (state, stepped, default, given_) for t in tensors(s))):
                assert t.device.type == device
                assert not t.dtype.is_floating_point or t.dtype == dtype
    trial.mixer.to(device="cpu", dtype=torch.float64)


LAWS = (
    forward_is_the_scan_of_step,
    any_chunking_gives_the_same,
    outputs_are_causal,
    final_states_are_equal,
    select_commutes_with_step,
    gradients_are_those_of_the_scan,
    padding_changes_nothing,
    dtype_and_device_are_kept,
)


def _gradients(trial: Trial, run: Callable[[Tensor, Any], tuple[Tensor, Any]]) -> list[Tensor]:
    """Gradients of one random functional of outputs and final state."""
    x = trial.x.clone().requires_grad_()
    state = trial.mixer.init_state(len(x), dtype=x.dtype) if trial.warm() is None else trial.warm()
    state = map_state(lambda t: t.detach().requires_grad_(t.dtype.is_floating_point), state)
    y, last = run(x, state)
    generator = torch.Generator().manual_seed(trial.seed)
    loss = (y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum()
    loss = loss + sum(t.square().sum() for t in tensors(last) if t.dtype.is_floating_point)
    roots = [x, *(t for t in tensors(state) if t.requires_grad)]
    return _grad(loss, roots + [p for p in getattr(trial.mixer, "parameters", tuple)() if p.requires_grad])


def _grad(loss: Tensor, roots: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, roots, allow_unused=True, materialize_grads=True))
