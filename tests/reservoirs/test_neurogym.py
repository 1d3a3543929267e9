"""The NeuroGym adapter, with the package itself where it is installed, and the classifier that reads it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from commissure.core.errors import BackendMissing, DegenerateError, InputError
from commissure.reservoirs.tasks import NeuroGym, fit_decisions


@pytest.fixture
def gym():
    return pytest.importorskip("neurogym")


def clouds(counts, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return rng.normal(size=(len(labels), 6)) + 1.2 * np.eye(len(counts), 6)[labels], labels


def test_the_classifier_is_sklearns_with_balanced_classes():
    linear = pytest.importorskip("sklearn.linear_model")
    metrics = pytest.importorskip("sklearn.metrics")
    x, labels = clouds([60, 300, 20])
    weights = np.random.default_rng(1).integers(0, 3, len(labels)).astype(float)
    ours = fit_decisions(x, labels, weights, penalty=2.0)
    share = {c: weights.sum() / (3 * weights[labels == c].sum()) for c in range(3)}
    balanced = weights * np.array([share[c] for c in labels])
    other = linear.RidgeClassifier(alpha=2.0).fit(x, labels, sample_weight=balanced)
    np.testing.assert_array_equal(ours.predict(x), other.predict(x))
    np.testing.assert_allclose(ours.fit.coefficients.T, other.coef_, atol=1e-10)
    expected = metrics.balanced_accuracy_score(labels, ours.predict(x), sample_weight=weights)
    assert ours.score(x, labels, weights) == pytest.approx(expected, abs=1e-12)


def test_rare_classes_count_as_much_as_frequent_ones():
    x, labels = clouds([900, 30])
    weights = np.ones(len(labels))
    ours = fit_decisions(x, labels, weights)
    rare = labels == 1
    assert (ours.predict(x)[rare] == 1).mean() > 0.6
    always = ours._replace(fit=ours.fit._replace(coefficients=0 * ours.fit.coefficients, intercept=np.array([1.0, 0])))
    assert always.score(x, labels, weights) == 0.5


def test_steps_without_weight_are_neither_fitted_nor_scored():
    x, labels = clouds([80, 80])
    weights = np.ones(160)
    weights[100:] = 0.0
    first = fit_decisions(x, labels, weights)
    x[100:], labels[100:] = 1e6, 1 - labels[100:]
    second = fit_decisions(x, labels, weights)
    np.testing.assert_array_equal(first.fit.coefficients, second.fit.coefficients)
    assert first.score(x, labels, weights) == first.score(x[:100], labels[:100], weights[:100])


def test_what_cannot_be_classified_is_refused():
    x, labels = clouds([20, 20])
    with pytest.raises(DegenerateError, match="1 class"):
        fit_decisions(x, np.zeros(40, int), np.ones(40))
    with pytest.raises(InputError, match="weights"):
        fit_decisions(x, labels, np.zeros(40))
    with pytest.raises(InputError, match="weights"):
        fit_decisions(x, labels, np.ones(39))
    with pytest.raises(InputError, match="n_trials"):
        NeuroGym(n_trials=0)
    with pytest.raises(InputError, match="grace"):
        NeuroGym(grace=-1)
    for name in ("env", "n_trials", "grace", "options"):
        for value in (True, 1.5, None, [2]):
            with pytest.raises(InputError, match=f"^{name} ="):
                NeuroGym(**{name: value})


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"labels": np.full(40, 0.5)}, "labels"),
        ({"labels": ["a"] * 40}, "labels"),
        ({"states": "x"}, "states"),
        ({"weights": np.full(40, np.nan)}, "weights[0]"),
        ({"penalty": "1"}, "penalty"),
        ({"penalty": True}, "penalty"),
    ],
)
def test_junk_is_refused_by_name(change, argument):
    x, labels = clouds([20, 20])
    given = {"states": x, "labels": labels, "weights": np.ones(40)} | change
    with pytest.raises(InputError) as raised:
        fit_decisions(given["states"], given["labels"], given["weights"], penalty=given.get("penalty", 1.0))
    assert raised.value.argument == argument


def test_states_of_other_nodes_are_refused():
    x, labels = clouds([20, 20])
    readout = fit_decisions(x, labels, np.ones(40))
    for states in (x[:, :5], x[0]):
        with pytest.raises(InputError, match="the nodes fitted"):
            readout.predict(states)
    with pytest.raises(InputError, match="shapes"):
        readout.score(x, labels[:3], np.ones(40))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "neurogym", None)
    with pytest.raises(BackendMissing, match=r"pip install 'commissure\[tasks\]'"):
        NeuroGym().data(0, "train")


def test_only_settled_decision_steps_count(gym):
    trials = NeuroGym(n_trials=30).trials(0, "train")
    assert trials.inputs.shape == (len(trials.labels), 5)
    decided = trials.labels >= 3  # the choices; rules are labels too, but not decisions
    assert trials.weights.sum() == 30 * 3  # of 7 steps
    assert decided[trials.weights > 0].all()
    assert NeuroGym(n_trials=30, grace=0).trials(0, "train").weights.sum() == decided.sum() == 30 * 7
    starts = np.flatnonzero(np.diff(decided.astype(int)) == 1) + 1
    for start in starts:
        assert not trials.weights[start : start + 4].any()
        assert trials.weights[start + 4 : start + 7].all()


def test_series_are_seeded_and_splits_differ(gym):
    task = NeuroGym(n_trials=40)
    first, again, test, other = (task.trials(*key) for key in ((0, "train"), (0, "train"), (0, "test"), (1, "train")))
    np.testing.assert_array_equal(first.inputs, again.inputs)
    np.testing.assert_array_equal(first.labels, again.labels)
    for different in (test, other):
        assert len(different.labels) != len(first.labels) or (different.labels != first.labels).any()


@pytest.mark.parametrize("env", ["HierarchicalReasoning-v0", "PerceptualDecisionMaking-v0", "DelayMatchSample-v0"])
def test_environments_give_one_code_a_step(gym, env):
    task = NeuroGym(env=env, n_trials=5, grace=0)
    data = task.data(0, "train")
    assert data.inputs.shape[1] == task.n_inputs
    assert data.targets.shape == (len(data.inputs), task.n_outputs)
    assert (data.targets.max(1) == 1).all()
    assert (data.targets.sum(1) == 2 - task.n_outputs).all()


def test_a_reservoir_learns_to_decide(gym):
    """Evidence of one stimulus, held until the answer: well above chance on trials of other random numbers."""
    from commissure.reservoirs.reservoir import Reservoir

    timing = {"stimulus": 500, "decision": 700}
    task = NeuroGym(env="PerceptualDecisionMaking-v0", options={"timing": timing, "cohs": [51.2]}, n_trials=300)
    weights = np.random.default_rng(0).normal(size=(80, 80))
    reservoir = Reservoir(weights, inputs=task.n_inputs, spectral_radius=0.9, dtype=torch.float64)
    train, test = (task.trials(0, split) for split in ("train", "test"))
    states = [reservoir(torch.from_numpy(part.inputs)[None])[0][0].numpy() for part in (train, test)]
    readout = fit_decisions(states[0], train.labels, train.weights, penalty=1e-3)
    assert readout.score(states[1], test.labels, test.weights) > 0.85


def test_bad_environments_are_refused(gym):
    with pytest.raises(InputError, match="NoSuchTask-v0"):
        NeuroGym(env="NoSuchTask-v0").data(0, "train")
    with pytest.raises(InputError, match=r"options = \{'nonsense': 1\}"):
        NeuroGym(options={"nonsense": 1}).data(0, "train")
    with pytest.raises(DegenerateError, match="grace of 4 steps"):
        NeuroGym(env="PerceptualDecisionMaking-v0").trials(0, "train")
