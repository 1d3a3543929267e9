"""Fitting a POSSM: it learns, repeats itself, stops early, weighs intervals, leaves the global state alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commissure.core.errors import CommissureWarning, ConvergenceError, InputError
from commissure.decode.fitting import TrainingBatch, _Source, possm_loss
from commissure.decode.possm import POSSM
from commissure.decode.presets import FitConfig, preset
from commissure.decode.recording import SpikeRecording
from commissure.decode.unit_dropout import UnitDropout, UnitDropoutRate
from commissure.decode.windows import interval_weights

SMALL = {"dim": 32, "rnn_dim": 32}
QUICK = FitConfig(steps=60, batch_size=8, lr=1e-2, unit_dropout=UnitDropoutRate(maximum=0.2), validate_every=10)


def tuned_recording(*, trials: bool, n_trials: int = 40, seed: int = 0, auxiliary: bool = False) -> SpikeRecording:
    """Twelve units whose rates follow one velocity."""
    rng = np.random.default_rng(seed)
    velocity = [np.cumsum(rng.normal(size=(10, 1)), 0) * 0.5 for _ in range(n_trials)]
    weights = np.linspace(-1, 1, 12)
    counts = [rng.poisson(np.exp(1 + 0.4 * v * weights)) for v in velocity]
    if not trials:
        counts, velocity = np.concatenate(counts), np.concatenate(velocity)
    extra = [np.cumsum(v, 0) for v in velocity] if auxiliary and trials else None
    return SpikeRecording.from_counts(counts, 0.05, behavior=velocity, auxiliary=extra, session=f"s{seed}")


def make_model(encoder: str = "additive", **changes: object) -> POSSM:
    embedding_std = 1.0 if encoder == "additive" else 0.3
    return POSSM(**{**SMALL, "encoder": encoder, "embedding_std": embedding_std, "out_dim": 1, **changes})


@pytest.mark.parametrize("encoder", ["softmax", "additive"])
@pytest.mark.parametrize("trials", [True, False])
def test_learns_a_simple_code(encoder: str, trials: bool) -> None:
    recording = tuned_recording(trials=trials)
    model = make_model(encoder).fit(recording, config=QUICK.model_copy(update={"window_s": 0.5}))
    result = model.training_result
    assert result is not None
    assert np.mean(result.losses[-10:]) < 0.6 * np.mean(result.losses[:5])
    assert model.score(recording) > 0.5
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_the_global_generator_is_untouched() -> None:
    recording = tuned_recording(trials=True)
    before = torch.random.get_rng_state()
    config = QUICK.model_copy(update={"steps": 5})
    first, again, other = (make_model().fit(recording, config=config, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, a), b, c in zip(
        first.state_dict().items(), again.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
        assert name.startswith(("target", "unit_scale")) or not torch.equal(a, c), name


def test_stops_early_and_keeps_the_best_weights() -> None:
    train, test = tuned_recording(trials=True), tuned_recording(trials=True)
    noise = SpikeRecording.from_counts(  # a validation session on which nothing can be gained
        np.random.default_rng(0).poisson(1.0, (200, 12)), 0.05, behavior=np.random.default_rng(1).normal(size=(200, 1)),
        session="s0", unit_ids=train.unit_ids,
    )  # fmt: skip
    config = QUICK.model_copy(update={"steps": 400, "patience": 2})
    model = make_model().fit(train, validation=noise, config=config)
    result = model.training_result
    assert result is not None
    assert result.steps < 400
    best = max(score for _, score in result.scores)
    assert dict(result.scores)[result.best_step] == best
    assert model.score(noise) == pytest.approx(best, abs=1e-6)
    full = make_model().fit(train, validation=test, config=QUICK)
    assert full.training_result is not None
    assert full.training_result.steps == 60


def test_interval_weights_select_the_samples_that_count() -> None:
    base = tuned_recording(trials=False)
    behavior = base.behavior.copy()
    late = base.behavior_times >= 10.0
    spoiled = behavior.copy()
    spoiled[late] += 1000.0 * np.random.default_rng(0).normal(size=(late.sum(), 1))

    def recording(values: np.ndarray) -> SpikeRecording:
        return SpikeRecording(
            base.times, base.units, unit_ids=base.unit_ids, behavior=values, behavior_times=base.behavior_times,
            session="s", epochs={"outlier": [[10.0, 1e6]], "reach": [[0.0, 1.0]]},
        )  # fmt: skip

    weights = interval_weights(recording(behavior), {"outlier": 0.0, "reach": 5.0})
    assert (weights[late] == 0).all()
    assert (weights[base.behavior_times < 1.0] == 5.0).all()
    assert (weights[(base.behavior_times >= 1.0) & ~late] == 1.0).all()

    losses = []
    for values in (behavior, spoiled):
        data, model = recording(values), make_model()
        model.add_session(data)
        config = QUICK.model_copy(update={"interval_weights": {"outlier": 0.0}, "window_s": 1.0})
        source = _Source(model, [data], targets=[data.behavior], config=config, seed=0)
        with torch.no_grad():
            losses.append([float(possm_loss(model.eval(), source.draw(step), 0.0)) for step in range(3)])
    assert losses[0] == losses[1]
    with pytest.raises(InputError, match="outlier, reach"):
        interval_weights(recording(behavior), {"hold": 1.0})


def test_missing_auxiliary_targets_are_said_and_leave_no_trace() -> None:
    with_aux, without = tuned_recording(trials=True, auxiliary=True), tuned_recording(trials=True, seed=1)
    config = QUICK.model_copy(update={"steps": 5})
    with pytest.warns(CommissureWarning, match="'s1' has no auxiliary"):
        model = make_model(auxiliary_dim=1).fit([with_aux, without], config=config)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.predict(without).shape == (400, 1)


def test_a_diverging_run_is_an_error() -> None:
    with pytest.raises(ConvergenceError, match="lower lr"):
        make_model().fit(tuned_recording(trials=True), config=QUICK.model_copy(update={"lr": 1e30, "clip": 1e30}))


def test_bins_wider_than_chunks_are_refused() -> None:
    recording = SpikeRecording.from_counts([[[1], [2]]], 0.1, behavior=[[[0.0], [1.0]]], session="s")
    with pytest.raises(InputError, match=r"chunk_s=0.1"):
        make_model(chunk_s=0.05).fit(recording)


def test_every_trial_is_seen_once_an_epoch() -> None:
    recording, model = tuned_recording(trials=True), make_model()
    model.add_session(recording)
    config = QUICK.model_copy(update={"batch_size": 10, "unit_dropout": None})
    source = _Source(model, [recording], targets=[recording.behavior], config=config, seed=0)
    for epoch in range(2):
        chosen = [id(item) for step in range(4) for item in source._chosen(4 * epoch + step)]
        assert len(set(chosen)) == len(recording.segments)


def _drawn(model: POSSM, recording: SpikeRecording, **changes: object) -> TrainingBatch:
    targets = np.concatenate((recording.behavior, recording.auxiliary), 1)
    config = QUICK.model_copy(update={"unit_dropout": None, **changes})
    return _Source(model, [recording], targets=[targets], config=config, seed=0).draw(0)


def test_the_loss_is_the_weighted_mean_of_both_targets() -> None:
    recording, model = tuned_recording(trials=True, auxiliary=True), make_model(auxiliary_dim=1).eval()
    model.add_session(recording)
    drawn = _drawn(model, recording)
    drawn = drawn._replace(weight=torch.linspace(0, 3, len(drawn.weight)))
    with torch.no_grad():
        outputs, _ = model(drawn.batch)
        behavior, auxiliary = ((drawn.weight * e).sum() / drawn.weight.sum() for e in (outputs - drawn.target).T ** 2)
        for share in (0.0, 0.3, 2.0):
            torch.testing.assert_close(possm_loss(model, drawn, share), behavior + share * auxiliary)


def test_unit_dropout_reaches_the_batch() -> None:
    recording, model = tuned_recording(trials=True, auxiliary=True), make_model(auxiliary_dim=1)
    model.add_session(recording)
    whole, thinned = (_drawn(model, recording, unit_dropout=d).batch for d in (None, UnitDropoutRate(maximum=0.9)))
    assert 0 < len(thinned.tokens.unit) < len(whole.tokens.unit)
    assert torch.equal(thinned.queries.chunk, whole.queries.chunk)


@pytest.mark.parametrize("field", ["ffn_dropout", "latent_dropout", "rnn_dropout", "hidden_dropout"])
def test_each_dropout_acts_in_training_and_only_there(field: str) -> None:
    recording = tuned_recording(trials=True, auxiliary=True)
    off = {"ffn_dropout": 0.0, "latent_dropout": 0.0, "rnn_dropout": 0.0, "hidden_dropout": 0.0}
    model = make_model(auxiliary_dim=1, rnn_layers=2, readout_ffn=False, **{**off, field: 0.5})
    plain = make_model(auxiliary_dim=1, rnn_layers=2, readout_ffn=False, **off).train()
    for each in (model, plain):
        each.add_session(recording)
    batch = _drawn(model, recording).batch
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        assert not torch.equal(model.train()(batch)[0], model(batch)[0])
        torch.testing.assert_close(model.eval()(batch)[0], plain(batch)[0], rtol=0, atol=0)


def test_presets_are_the_published_layout_and_the_recipe() -> None:
    ss, direct = preset("possm-ss"), preset("possm-direct")
    assert (ss.model.encoder, ss.model.readout_norm, ss.model.readout_ffn) == ("softmax", True, True)
    assert (ss.model.embedding_std, ss.model.t_min, ss.model.latent_dropout, ss.model.hidden_dropout) == (
        0.02,
        1e-4,
        0,
        0,
    )
    assert (ss.fit.lr, ss.fit.warmup, ss.fit.betas, ss.fit.weight_decay) == (1e-3, 0.1, (0.9, 0.98), 1e-3)
    assert ss.fit.unit_dropout == UnitDropout(minimum=60, mode=300, maximum=1000, peak=4)
    assert (direct.model.encoder, direct.model.readout_norm, direct.model.readout_ffn) == ("additive", False, False)
    assert (direct.model.embedding_std, direct.model.t_min, direct.model.auxiliary_dim) == (1.0, 5e-3, 2)
    assert (direct.model.ffn_dropout, direct.model.latent_dropout, direct.model.hidden_dropout) == (0.2, 0.3, 0.3)
    assert (direct.fit.steps, direct.fit.batch_size, direct.fit.lr, direct.fit.clip) == (450, 16, 2e-3, 1.0)
    assert (direct.fit.betas, direct.fit.weight_decay, direct.fit.warmup) == ((0.9, 0.98), 1e-3, 0.1)
    assert (direct.fit.unit_dropout, direct.fit.auxiliary_weight) == (UnitDropoutRate(maximum=0.3), 0.3)
    for each in (ss.model, direct.model):
        assert (each.rnn_dim, each.rnn_layers, each.context, each.t_max) == (256, 1, 3, 10.0)
    assert (ss.model.dim, direct.model.dim) == (64, 256)
