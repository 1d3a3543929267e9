"""Shape annotations are promises: one ordinary pass through the public API with every signature checked at run time.

The pass runs in its own process, because the import hook (jaxtyping with beartype) only reaches modules imported after
it; `python test_types.py` runs it by hand.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for mypy
CHECKED = ("commissure.core", "commissure.decode", "commissure.native", "commissure.nn", "commissure.train")


def test_every_signature_holds_in_an_ordinary_pass() -> None:
    done = subprocess.run([sys.executable, "-W", "error", __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["refused", "mixers", "baselines", "possm", "streams", "spine"]


def _main() -> None:
    from jaxtyping import install_import_hook

    with install_import_hook(list(CHECKED), "__main__.check"):
        import commissure.core
        import commissure.decode
        import commissure.native.possm
        import commissure.nn  # noqa: F401
    for part in (_refused, _mixers, _baselines, _possm_and_streams, _spine):
        part()


def _refused() -> None:
    """The hook is live: a wrong shape is refused before the function runs."""
    import torch
    from jaxtyping import TypeCheckError

    from commissure.decode.encoder import segment_softmax

    try:
        segment_softmax(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), 1)
    except TypeCheckError:
        print("refused")


def _mixers() -> None:
    import torch

    from commissure.core.mixer import detach, nbytes, scan, select, where
    from commissure.nn import GRU, S4D, Attention, Mamba, Stack

    for mixer in (Attention(8, heads=2, rotary=True), Attention(8, window=2), GRU(8), S4D(8, chunk=4), Mamba(8),
                  Stack(["gru", "attention"], 8, positions="rotary")):  # fmt: skip
        x, lengths = torch.randn(3, 9, 8), torch.tensor([9, 0, 4])
        _, state = mixer(x, lengths=lengths)
        y, state = mixer(x, state)
        y.sum().backward()
        rows = torch.tensor([0, 2])
        _, stepped = mixer.step(x[rows, 0], detach(select(state, rows)))
        scan(mixer, x[rows], where(torch.tensor([True, False]), stepped, stepped))
        assert nbytes(stepped) > 0
    language = Stack(["s4d"], 8, vocab=5, soft_cap=10.0, tie=True)
    assert language.log_probs(torch.tensor([[1, 2, 3]])).shape == (1, 4, 5)
    print("mixers")


def _recordings() -> list:
    """One recording in trials of binned counts with positions, one continuous recording of spike times."""
    import numpy as np

    from commissure.decode import SpikeRecording, simulate_reaching

    rng = np.random.default_rng(0)
    velocity = [np.cumsum(rng.normal(size=(6, 2)), 0) for _ in range(20)]
    counts = [rng.poisson(np.exp(0.3 * v @ rng.normal(size=(2, 5)))) for v in velocity]
    position = [np.cumsum(v, 0) for v in velocity]
    trials = SpikeRecording.from_counts(counts, 0.05, behavior=velocity, auxiliary=position, session="trials")
    (continuous,) = simulate_reaching("CO", n_units=5, duration_s=8.0, timing=0.3, dropout_units=0.2, jitter_ms=1.0)
    return [trials, continuous]


def _baselines() -> None:
    import numpy as np

    from commissure.decode import BinnedGRU, BinnedMLP, KalmanFilter, WienerFilter, WindowDecoder, r2_per_output
    from commissure.train import TrainConfig

    quick = TrainConfig(steps=2, batch_size=3)
    for recording in _recordings():
        for decoder in (
            WienerFilter(0.1, folds=3),
            KalmanFilter(0.1, folds=2, lead=1, shrinkage=0.3, power=0.5),
            BinnedGRU(0.1, hidden_dim=8, training=quick),
            BinnedMLP(0.1, hidden_dim=8, training=quick),
        ):
            prediction = decoder.fit(recording, seed=1, progress=lambda done, total, value: None).predict(recording)
            assert decoder.score(recording) == np.mean(r2_per_output(recording.behavior, prediction))
            decoder.predict(recording, at=recording.behavior_times[3:5])
    trials = _recordings()[0].select_trials([0, 3])
    window = WindowDecoder(n_units=5, dim=8, depth=1, self_heads=1, latents_per_group=1)
    assert window.predict(trials).shape == trials.behavior.shape
    window([0.1], [0], at=[0.5]).sum().backward()
    print("baselines")


def _possm_and_streams() -> None:
    import numpy as np

    from commissure.decode import POSSM, FitConfig, StreamingDecoder, UnitDropout, UnitDropoutRate
    from commissure.decode.encoder import encode_padded_reference
    from commissure.decode.replay import replay_stream
    from commissure.decode.windows import collate, cut_window
    from commissure.native import backend

    built = backend() == "c++"

    trials, continuous = _recordings()
    fitted = []
    for encoder, backbone, null_token, dropout in (
        ("softmax", "gru", "empty", UnitDropout(minimum=2, mode=3, maximum=4)),
        ("softmax", "s4d", "always", None),
        ("additive", "mamba", "empty", UnitDropoutRate()),
        ("additive", "attention", "empty", None),
    ):
        model = POSSM(dim=32, rnn_dim=16, backbone=backbone, encoder=encoder, null_token=null_token, auxiliary_dim=2)
        config = FitConfig(steps=2, batch_size=2, window_s=0.5, unit_dropout=dropout, validate_every=1)
        model.fit([trials, continuous], config=config, validation=trials, seed=1)
        for recording in (trials, continuous):
            assert model.predict(recording).shape == recording.behavior.shape
            assert np.isfinite(model.score(recording))
        assert model.predict(continuous, at=np.array([1.0, 2.0])).shape == (2, 2)
        fitted.append(model)
    window = cut_window(continuous, 0.0, stop=1.0, chunk_s=0.05)
    encode_padded_reference(fitted[0].encoder, collate([window], [1], [5]).tokens, fitted[0].unit_table())
    print("possm")
    with tempfile.TemporaryDirectory() as folder:
        for model in fitted:
            engines = ("c++", "torch") if built and model.config.backbone != "attention" else ("torch",)
            model.save(Path(folder) / "model")
            for engine in engines:
                loaded = POSSM.load(Path(folder) / "model")
                stream = StreamingDecoder(loaded, session="trials", engine=engine, late="fold", duplicates="drop")
                stream.push(np.array([0.01, 0.12, 0.02]), [0, 4, 1])
                stream.push_counts(np.ones((2, 5), int))
                stream.warmup(1)
                assert stream.poll(0.05).values.shape == (5, 2)
                stream.save(Path(folder) / "stream")
                stream.load(Path(folder) / "stream")
                stream.copy().step(np.zeros(0), np.zeros(0, int))
                stream.advance(2)
                stream.idle()
                assert stream.stats().chunks == 3
                replay_stream(loaded, trials, engine=engine)
    print("streams")


def _spine() -> None:
    import numpy as np

    from commissure.core import lsq, moments, stats

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 3)), rng.normal(size=(30, 2))
    lsq.ridge(x, y, penalty=0.1, sample_weight=np.ones(30)).predict(x)
    assert moments.__all__
    assert stats.__all__
    print("spine")


if __name__ == "__main__":
    _main()
