"""The streaming engine equals its reference: every layout, ragged chunks, any split, saved and loaded anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from commissure.core.errors import InputError
from commissure.native import kernels
from commissure.native import possm as door
from commissure.native.possm import PossmStep, PossmStepReference, PossmWeights

Maker = Callable[..., PossmWeights]
native = kernels()
needs_native = pytest.mark.skipif(native is None, reason="built without a C++ compiler")
OFFSETS = (-0.05, -0.04, -0.03, -0.02, -0.01)
COUNTS = (0, 1, 7, 40, 0, 0, 33, 2)
LIMIT = {"float32": 1e-5, "float64": 1e-10}

LAYOUTS = {
    "published gru": {},
    "null always": {"null_token": "always"},
    "direct gru": {"encoder": "additive", "decoder_norm": False, "decoder_ffn": False},
    "s4d": {"backbone": "s4d"},
    "direct s4d": {"backbone": "s4d", "encoder": "additive", "decoder_norm": False, "decoder_ffn": False, "layers": 2},
    "mamba": {"backbone": "mamba", "null_token": "always"},
    "direct mamba": {"backbone": "mamba", "encoder": "additive", "layers": 2},
    "deep gru": {"layers": 3, "decoder_ffn": False},
    "odd sizes": {"dim": 33, "hidden": 37, "head": 41, "frequencies": 5, "units": 3, "outputs": 3, "context": 5},
    "one of each": {"dim": 2, "hidden": 1, "head": 2, "frequencies": 1, "units": 1, "outputs": 1, "context": 1},
    "preset size": {"dim": 64, "hidden": 256, "units": 300},
    "preset mamba": {"dim": 64, "hidden": 256, "units": 300, "backbone": "mamba", "modes": 16},
}


def chunks(
    weights: PossmWeights, counts: tuple[int, ...] = COUNTS, seed: int = 1
) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    half = weights.chunk_s / 2
    return [(rng.integers(0, weights.n_units, n), rng.uniform(-half, half, n)) for n in counts]


def run(engine: PossmStep | PossmStepReference, spikes: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    outputs = []
    for units, offsets in spikes:
        engine.fold(units, offsets)
        outputs.append(engine.close())
        engine.idle()
    return np.array(outputs)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@needs_native
@pytest.mark.parametrize("clone", [] if native is None else native.clones())
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_engine_equals_reference(make_weights: Maker, layout: str, dtype: str, clone: str) -> None:
    weights = make_weights(**LAYOUTS[layout])
    spikes = chunks(weights)
    engine = PossmStep(weights, offsets=OFFSETS, dtype=dtype, clone=clone)  # type: ignore[arg-type]
    expected = run(PossmStepReference(weights, offsets=OFFSETS), spikes)
    assert distance(run(engine, spikes), expected) <= LIMIT[dtype]
    engine.reset()
    assert distance(run(engine, spikes), expected) <= LIMIT[dtype]


@needs_native
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("encoder", ["softmax", "additive"])
def test_a_chunk_of_5000_spikes(make_weights: Maker, encoder: str, dtype: str) -> None:
    weights = make_weights(encoder=encoder, units=200)
    spikes = chunks(weights, (5000, 3, 5000))
    expected = run(PossmStepReference(weights, offsets=OFFSETS), spikes)
    assert distance(run(PossmStep(weights, offsets=OFFSETS, dtype=dtype), spikes), expected) <= LIMIT[dtype]  # type: ignore[arg-type]


@needs_native
@pytest.mark.parametrize("backbone", ["gru", "s4d", "mamba"])
def test_single_precision_does_not_drift(make_weights: Maker, backbone: str) -> None:
    weights = make_weights(backbone=backbone)
    spikes = chunks(weights, (20,) * 300)
    expected = run(PossmStepReference(weights, offsets=OFFSETS), spikes)
    found = run(PossmStep(weights, offsets=OFFSETS), spikes)
    assert distance(found[-20:], expected[-20:]) <= 1e-5


@needs_native
@pytest.mark.parametrize(
    "times", [(), (10.0,), *(tuple(np.linspace(-0.05, 0.2, n)) for n in (2, 3, 4, 5, 6, 7, 17))], ids=len
)
def test_output_times_of_one_call(make_weights: Maker, times: tuple[float, ...]) -> None:
    weights = make_weights()
    engine = PossmStep(weights, offsets=OFFSETS, dtype="float64")
    other = PossmStep(weights, offsets=times, dtype="float64")
    reference = PossmStepReference(weights, offsets=OFFSETS)
    for units, offsets in chunks(weights):
        for each in (engine, other, reference):
            each.fold(units, offsets)
        expected = reference.close(offsets=times)
        assert expected.shape == (len(times), weights.n_outputs)
        np.testing.assert_allclose(engine.close(offsets=times), expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose(other.close(), expected, rtol=0, atol=1e-9)


@pytest.fixture(params=[PossmStep, PossmStepReference], ids=["engine", "reference"])
def engine_type(request: pytest.FixtureRequest) -> type[PossmStep]:
    return request.param


def test_encoding_without_readout_changes_nothing_later(make_weights: Maker, engine_type: type[PossmStep]) -> None:
    weights = make_weights()
    full, quiet = (engine_type(weights, offsets=OFFSETS, dtype="float64") for _ in range(2))
    for index, (units, offsets) in enumerate(chunks(weights)):
        full.fold(units, offsets)
        quiet.fold(units, offsets)
        expected, found = full.close(), quiet.close(readout=index % 3 == 0)
        assert np.array_equal(found, expected) if index % 3 == 0 else found.shape == (0, weights.n_outputs)


@pytest.mark.parametrize("encoder", ["softmax", "additive"])
def test_any_split_and_order_of_spikes(make_weights: Maker, engine_type: type[PossmStep], encoder: str) -> None:
    weights = make_weights(encoder=encoder)
    whole, parts, shuffled = (engine_type(weights, offsets=OFFSETS, dtype="float64") for _ in range(3))
    rng = np.random.default_rng(3)
    for units, offsets in chunks(weights):
        whole.fold(units, offsets)
        for some in np.array_split(np.arange(units.size), rng.integers(1, 9)):
            parts.fold(units[some], offsets[some])
        order = rng.permutation(units.size)
        shuffled.fold(units[order], offsets[order])
        expected = whole.close()
        np.testing.assert_allclose(parts.close(), expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose(shuffled.close(), expected, rtol=0, atol=1e-9)


def test_duplicated_spikes_count_only_beside_a_null_token(make_weights: Maker, engine_type: type[PossmStep]) -> None:
    differences = {}
    for name, layout in {"empty": {}, "always": {"null_token": "always"}, "additive": {"encoder": "additive"}}.items():
        weights = make_weights(**layout)
        once, thrice = (engine_type(weights, offsets=OFFSETS, dtype="float64") for _ in range(2))
        (units, offsets), *_ = chunks(weights, (12,))
        once.fold(units, offsets)
        thrice.fold(np.tile(units, 3), np.tile(offsets, 3))
        differences[name] = distance(thrice.close(), once.close())
    assert differences["empty"] < 1e-12
    assert differences["always"] > 1e-4
    assert differences["additive"] > 1e-4


def test_relabelled_units(make_weights: Maker, engine_type: type[PossmStep]) -> None:
    from dataclasses import replace

    weights = make_weights()
    order = np.random.default_rng(5).permutation(weights.n_units)
    relabelled = replace(weights, unit_key=weights.unit_key[order], unit_value=weights.unit_value[order])  # type: ignore[index]
    place = np.argsort(order)
    spikes = chunks(weights)
    expected = run(engine_type(weights, offsets=OFFSETS, dtype="float64"), spikes)
    found = run(engine_type(relabelled, offsets=OFFSETS, dtype="float64"), [(place[u], d) for u, d in spikes])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_hidden_states_older_than_the_context_are_forgotten(make_weights: Maker, engine_type: type[PossmStep]) -> None:
    weights = make_weights()
    engine = engine_type(weights, offsets=OFFSETS, dtype="float64")
    for seen in range(5):
        assert engine.state().n_contexts == min(seen, weights.context)
        engine.fold(*chunks(weights, (9,), seed=seen)[0])
        engine.close()
    state = engine.state()
    oldest = state._replace(keys=state.keys.copy(), values=state.values.copy())
    oldest.keys[2], oldest.values[2] = 0.0, 0.0
    other = engine_type(weights, offsets=OFFSETS, dtype="float64")
    other.load_state(oldest)
    assert np.array_equal(other.close(), engine.close())


@pytest.mark.parametrize("backbone", ["gru", "s4d", "mamba"])
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("null_token", ["empty", "always"])
@needs_native
def test_state_goes_on_bit_identically_in_the_middle_of_a_chunk(
    make_weights: Maker, backbone: str, dtype: str, null_token: str
) -> None:
    weights = make_weights(backbone=backbone, layers=2, null_token=null_token)
    engine = PossmStep(weights, offsets=OFFSETS, dtype=dtype)  # type: ignore[arg-type]
    for index, (units, offsets) in enumerate(chunks(weights)):
        half = units.size // 2
        engine.fold(units[:half], offsets[:half])
        loaded, copied = PossmStep(weights, offsets=OFFSETS, dtype=dtype), engine.copy()  # type: ignore[arg-type]
        loaded.load_state(engine.state())
        results = []
        for each in (engine, loaded, copied):
            each.fold(units[half:], offsets[half:])
            results.append(each.close())
            if index % 2:
                each.idle()
        assert np.array_equal(results[0], results[1])
        assert np.array_equal(results[0], results[2])
        for found in (loaded.state(), copied.state()):
            assert all(np.array_equal(a, b) for a, b in zip(found, engine.state(), strict=True))


@pytest.mark.parametrize("layout", ["null always", "direct s4d", "direct mamba", "odd sizes"])
@needs_native
def test_engine_and_reference_read_each_others_state(make_weights: Maker, layout: str) -> None:
    weights = make_weights(**LAYOUTS[layout])
    engine, reference = (
        PossmStep(weights, offsets=OFFSETS, dtype="float64"),
        PossmStepReference(weights, offsets=OFFSETS),
    )
    for units, offsets in chunks(weights):
        half = units.size // 2
        for each in (engine, reference):
            each.fold(units[:half], offsets[:half])
        state, other = engine.state(), reference.state()
        np.testing.assert_allclose(state.total, other.total, atol=1e-9)
        np.testing.assert_allclose(state.hidden, other.hidden, atol=1e-9)
        engine.load_state(other)
        reference.load_state(state)
        for each in (engine, reference):
            each.fold(units[half:], offsets[half:])
        np.testing.assert_allclose(engine.close(), reference.close(), rtol=0, atol=1e-9)


def test_bad_spikes_name_their_index_and_change_nothing(make_weights: Maker, engine_type: type[PossmStep]) -> None:
    weights = make_weights()
    engine = engine_type(weights, offsets=OFFSETS, dtype="float64")
    untouched = engine.copy()
    for units, offsets, name in [
        ([0, 11], [0.0, 0.0], "units[1]"),
        ([0, 0, -1], [0.0, 0.0, 0.0], "units[2]"),
        ([2**62], [0.0], "units[0]"),
        ([0, 1], [0.0, np.nan], "offsets[1]"),
        ([0, 1], [np.inf, 0.0], "offsets[0]"),
        ([0, 1], [0.0], "units"),
        ([0.5], [0.0], "units"),
        ([[0]], [[0.0]], "units"),
    ]:
        with pytest.raises(InputError) as caught:
            engine.fold(np.array(units), np.array(offsets))
        assert caught.value.argument == name
    assert np.array_equal(engine.close(), untouched.close())


def test_bad_arguments(make_weights: Maker, engine_type: type[PossmStep]) -> None:
    weights = make_weights()
    with pytest.raises(InputError, match=r"offsets\[1\]"):
        engine_type(weights, offsets=(0.0, np.nan), dtype="float64")
    engine = engine_type(weights, offsets=OFFSETS, dtype="float64")
    with pytest.raises(InputError, match=r"offsets\[0\]"):
        engine.close(offsets=(np.inf,))
    with pytest.raises(InputError, match="dtype"):
        PossmStep(weights, offsets=OFFSETS, dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"state\.hidden"):
        PossmStep(weights, offsets=OFFSETS).load_state(engine.state()._replace(hidden=np.zeros(3)))
    with pytest.raises(InputError, match=r"state\.n_contexts"):
        PossmStep(weights, offsets=OFFSETS).load_state(engine.state()._replace(n_contexts=9))


def test_weights_of_wrong_shape_are_refused(make_weights: Maker) -> None:
    from dataclasses import fields, replace

    weights = make_weights(backbone="s4d")
    for field in fields(weights):
        value = getattr(weights, field.name)
        if isinstance(value, np.ndarray):
            with pytest.raises(InputError):
                replace(weights, **{field.name: value[..., :-1] if field.name != "periods" else -value})
            with pytest.raises(InputError, match="finite"):
                replace(weights, **{field.name: value * np.nan})
    for change in (
        {"encoder": "mean"},
        {"context": 0},
        {"chunk_s": 0.0},
        {"layers": ()},
        {"query": None},
        {"backbone": "gru"},
    ):
        with pytest.raises(InputError):
            replace(weights, **change)


@needs_native
def test_threads_may_push_and_poll_at_once(make_weights: Maker) -> None:
    weights = make_weights()
    engine = PossmStep(weights, offsets=OFFSETS)
    units, offsets = chunks(weights, (64,))[0]
    workers = [threading.Thread(target=lambda: [engine.fold(units, offsets) for _ in range(200)]) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert engine.state().n_spikes == 3 * 200 * 64
    assert np.all(np.isfinite(engine.close()))


def test_without_the_extension_the_reference_runs(make_weights: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "kernels", lambda: None)
    weights = make_weights()
    engine = PossmStep(weights, offsets=OFFSETS)
    assert engine.backend == "python"
    spikes = chunks(weights)
    expected = run(PossmStepReference(weights, offsets=OFFSETS), spikes)
    assert np.array_equal(run(engine, spikes), expected)
    other = PossmStep(weights, offsets=OFFSETS)
    other.load_state(engine.copy().state())
    np.testing.assert_allclose(other.close(), engine.close(), atol=1e-12)


def test_reference_against_closed_forms(make_weights: Maker) -> None:
    """One spike takes all of the softmax: z = latent + W R(d) v + b; a score depends on the time difference only."""
    from commissure.native.possm_reference import _feed_forward, _rotate

    weights = make_weights(backbone="s4d")
    engine = PossmStepReference(weights, offsets=OFFSETS)
    engine.fold(np.array([4]), np.array([0.013]))
    value = weights.unit_value[4]
    pairs, angle = value[:32].reshape(16, 2), 2 * np.pi * 0.013 / weights.periods
    turned = (pairs[:, 0] + 1j * pairs[:, 1]) * np.exp(1j * angle)
    rotated = np.concatenate([np.stack([turned.real, turned.imag], 1).ravel(), value[32:]])
    expected = weights.latent + weights.out_weight @ rotated + weights.out_bias  # type: ignore[operator]
    np.testing.assert_allclose(engine._encode(), _feed_forward(weights.ffn, expected), rtol=0, atol=1e-11)
    q, k = np.random.default_rng(0).normal(size=(2, 64))
    scores = [_rotate(q, t, weights.periods) @ _rotate(k, t + 0.007, weights.periods) for t in (0.0, 0.3, 2.0)]
    np.testing.assert_allclose(scores, scores[0], rtol=0, atol=1e-9)
    assert np.linalg.norm(_rotate(k, 0.021, weights.periods)) == pytest.approx(np.linalg.norm(k), abs=1e-12)
