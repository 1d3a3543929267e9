"""POSSM: published sizes, streaming = offline, causality, time shifts, the k-window, files and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from commissure.core.errors import InputError, NotFittedError
from commissure.core.mixer import map_state
from commissure.decode import possm
from commissure.decode.possm import POSSM
from commissure.decode.presets import preset
from commissure.decode.recording import SpikeRecording
from commissure.decode.windows import collate, cut_window

PRESETS, BACKBONES = ("possm-ss", "possm-direct"), ("gru", "s4d", "mamba")
CHUNK_S = 0.05


def make_recording(duration: float = 4.0, n_units: int = 9, seed: int = 0, rate: float = 12.0) -> SpikeRecording:
    rng = np.random.default_rng(seed)
    n = rng.poisson(duration * n_units * rate)
    at = np.arange(0, duration, 0.02)
    return SpikeRecording(
        np.sort(rng.uniform(0, duration, n)),
        rng.integers(0, n_units, n),
        unit_ids=tuple(f"u{i}" for i in range(n_units)),
        behavior=np.stack((np.sin(3 * at), np.cos(2 * at)), 1),
        behavior_times=at,
        session=f"session-{seed}",
    )


def make_model(name: str, backbone: str = "gru", *recordings: SpikeRecording, **changes: object) -> POSSM:
    fields = preset(name).model.model_dump() | {"backbone": backbone, "auxiliary_dim": 0, "rnn_dim": 32} | changes
    model = POSSM(**fields).double().eval()
    for recording in recordings:
        model.add_session(recording)
    # weights far from their small initial values, so that every path carries signal
    rng = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype))
    return model


@pytest.mark.parametrize(("backbone", "published"), [("gru", 405_440), ("s4d", 339_648), ("mamba", 612_544)])
def test_published_parameter_counts(backbone: str, published: int) -> None:
    model = POSSM.from_preset("possm-ss", backbone=backbone)
    outside = ("unit_embedding", "session_embedding", "encoder.latent", "encoder.null_embedding", "readout.output")
    counted = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(outside))
    assert counted == published


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("block", [1, 7])
def test_any_split_of_the_stream_equals_the_whole(name: str, backbone: str, block: int) -> None:
    recording = make_recording(duration=2.03)
    model = make_model(name, backbone, recording)
    whole = model.predict(recording)
    state, pieces = None, np.full_like(whole, np.nan)
    for first in range(0, 41, block):
        start, stop = first * CHUNK_S, min((first + block) * CHUNK_S, 2.03)
        window = cut_window(recording, start, stop=stop, chunk_s=CHUNK_S)
        outputs, state = model(collate([window], [0], [0]), state)
        pieces[window.samples] = model.denormalize(outputs).detach().numpy()
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PRESETS)
def test_rows_of_a_batch_do_not_see_each_other_or_the_padding(name: str) -> None:
    recording = make_recording()
    model = make_model(name, "gru", recording)
    spans = [(0.0, 1.0), (1.3, 1.55), (2.0, 3.9)]
    windows = [cut_window(recording, start, stop=stop, chunk_s=CHUNK_S) for start, stop in spans]
    together, state = model(collate(windows, [0] * 3, [0] * 3))
    alone = [model(collate([window], [0], [0])) for window in windows]
    torch.testing.assert_close(together, torch.cat([out for out, _ in alone]), rtol=0, atol=1e-11)
    for i, (_, single) in enumerate(alone):
        map_state(lambda a, b, i=i: torch.testing.assert_close(a[i : i + 1], b, rtol=0, atol=1e-11), state, single)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_outputs_depend_on_no_later_chunk(name: str, backbone: str) -> None:
    recording = make_recording(duration=1.0)
    model = make_model(name, backbone, recording)
    window = cut_window(recording, 0.0, stop=1.0, chunk_s=CHUNK_S)
    forecast = window._replace(query_offset=window.query_offset + 0.1)  # queries beyond their chunk
    for cut in (window, forecast):
        batch = collate([cut], [0], [0])
        table = model.unit_table().detach()
        per_spike = table[batch.tokens.unit].requires_grad_()
        tokens = batch.tokens._replace(unit=torch.arange(len(per_spike)))
        latents = model.encoder(tokens, per_spike).view(1, batch.n_chunks, -1)
        hidden, _ = model.backbone(latents, lengths=batch.lengths)
        context = torch.cat((torch.zeros(1, 2, hidden.shape[2], dtype=hidden.dtype), hidden), 1)
        queries = batch.queries
        outputs = model.readout(
            context,
            model.session_embedding[:1],
            row=queries.row,
            chunk=queries.chunk,
            offset=queries.offset,
            n_before=torch.zeros(1, dtype=torch.long),
        )
        for b in (4, 11):
            (gradient,) = torch.autograd.grad(outputs[queries.chunk == b].sum(), per_spike, retain_graph=True)
            size = gradient.abs().sum(1)
            assert (size[batch.tokens.slot > b] == 0).all()
            assert (size[batch.tokens.slot == b] > 0).all()
            assert (size[batch.tokens.slot == b - 4] > 0).all()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shift", [1e3, 1e6])
def test_absolute_time_does_not_matter(name: str, shift: float) -> None:
    recording = make_recording(duration=1.0)
    later = SpikeRecording(
        recording.times + shift,
        recording.units,
        unit_ids=recording.unit_ids,
        behavior=recording.behavior,
        behavior_times=recording.behavior_times + shift,
        session=recording.session,
    )
    # the stream's own start, not the first spike's rounding, anchors the chunks
    model = make_model(name, "gru", recording)
    np.testing.assert_allclose(model.predict(later), model.predict(recording), rtol=0, atol=1e-6)


def test_only_the_newest_hidden_states_reach_an_output_directly() -> None:
    recording = make_recording(duration=1.0)
    model = make_model("possm-ss", "gru", recording)
    batch = collate([cut_window(recording, 0.0, stop=1.0, chunk_s=CHUNK_S)], [0], [0])
    hidden = torch.randn(1, 2 + 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    queries = batch.queries

    def outputs(context: torch.Tensor, n_before: int) -> torch.Tensor:
        return model.readout(
            context,
            model.session_embedding[:1],
            row=queries.row,
            chunk=queries.chunk,
            offset=queries.offset,
            n_before=torch.tensor([n_before]),
        )

    reference, changed = outputs(hidden, 0), hidden.clone()
    changed[:, : 2 + 10 - 2] = 0  # everything older than the three states of chunk 10
    same = queries.chunk >= 10
    assert torch.equal(outputs(changed, 0)[same], reference[same])
    assert not torch.allclose(outputs(changed, 0)[~same], reference[~same])
    prefix = hidden.clone()
    prefix[:, :2] = 7.0  # before the stream began there are no states, whatever the memory holds
    assert torch.equal(outputs(prefix, 0), reference)
    assert not torch.allclose(outputs(prefix, 2)[queries.chunk == 0], reference[queries.chunk == 0])


def test_long_recordings_keep_every_spike() -> None:
    recording = make_recording(duration=60.0, n_units=5, rate=5.0)
    model = make_model("possm-ss", "gru", recording)
    before = model.predict(recording, at=np.array([5.0, 30.0]))
    index = int(np.searchsorted(recording.times, 29.97))
    units = recording.units.copy()
    units[index : index + 3] = (units[index : index + 3] + 1) % 5
    changed = SpikeRecording(
        recording.times,
        units,
        unit_ids=recording.unit_ids,
        behavior=recording.behavior,
        behavior_times=recording.behavior_times,
        session=recording.session,
    )
    after = model.predict(changed, at=np.array([5.0, 30.0]))
    assert (after[0] == before[0]).all()
    assert (after[1] != before[1]).all()


@pytest.mark.parametrize("name", PRESETS)
def test_save_and_load_are_bit_identical(name: str, tmp_path: Path) -> None:
    recordings = [make_recording(seed=0), make_recording(seed=1, n_units=4)]
    model = POSSM.from_preset(name, backbone="s4d", auxiliary_dim=0, seed=3)
    for recording in recordings:
        model.add_session(recording)
    model.save(tmp_path / "model.safetensors")
    loaded = POSSM.load(tmp_path / "model.safetensors")
    for recording in recordings:
        assert (loaded.predict(recording) == model.predict(recording)).all()
    assert loaded.config == model.config
    assert loaded.fit_config == model.fit_config


def test_sessions_do_not_depend_on_the_order_they_came_in() -> None:
    first, second = make_recording(seed=0), make_recording(seed=1)
    a, b = POSSM.from_preset("possm-ss"), POSSM.from_preset("possm-ss")
    for model, order in ((a, (first, second)), (b, (second, first))):
        for recording in order:
            model.add_session(recording)
    # the tables hold the same rows in another order; batched matrix products may round differently
    np.testing.assert_allclose(a.predict(first), b.predict(first), rtol=0, atol=1e-6)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    made = POSSM(dim=32, rnn_dim=8)
    made.save(path)
    before = path.read_bytes()

    def torn(tensors: object, target: str, **options: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(possm, "save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        made.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="path"):
        made.save(tmp_path / "missing" / "model.safetensors")


def test_a_factory_makes_the_backbone_and_is_needed_to_load(tmp_path: Path) -> None:
    from commissure.nn import GRU

    recording = make_recording()
    model = POSSM(backbone=GRU, rnn_dim=16)
    model.add_session(recording)
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="mixer"):
        POSSM.load(tmp_path / "model.safetensors")
    loaded = POSSM.load(tmp_path / "model.safetensors", mixer=GRU)
    assert (loaded.predict(recording) == model.predict(recording)).all()


def test_bad_input_is_named() -> None:
    recording = make_recording()
    model = POSSM.from_preset("possm-ss")
    with pytest.raises(NotFittedError, match="fit"):
        model.predict(recording)
    model.add_session(recording)
    with pytest.raises(InputError, match=r"session = 'session-5'.*session-0"):
        model.predict(make_recording(seed=5))
    with pytest.raises(InputError, match="unit_ids"):
        model.predict(make_recording(n_units=4))
    with pytest.raises(InputError, match=r"at\[1\] = 99.0"):
        model.predict(recording, at=np.array([1.0, 99.0]))
    with pytest.raises(InputError, match="one of possm-direct, possm-ss"):
        POSSM.from_preset("possm-xl")
    for chunk_s in (0.0, 1e-9, np.inf):
        with pytest.raises(InputError, match=rf"POSSMConfig.chunk_s = {chunk_s}"):
            POSSM(chunk_s=chunk_s)
    with pytest.raises(InputError, match="t_min < t_max"):
        POSSM(t_min=1.0, t_max=0.1)
    with pytest.raises(InputError, match="a SequenceMixer"):
        POSSM(backbone=lambda dim: torch.nn.Linear(dim, dim))
    with pytest.raises(InputError, match="out_dim=2"):
        POSSM(out_dim=3).fit(recording)
    with pytest.raises(InputError, match="window_s"):
        model.fit(recording, config=model.fit_config.model_copy(update={"window_s": 10.0}))
    with pytest.raises(InputError, match="recordings"):
        model.fit([])
    with pytest.raises(InputError, match=r"recordings\[1\] = 'ndarray'"):
        model.fit([recording, np.zeros(3)])  # type: ignore[list-item]
    silent = SpikeRecording([0.1], [0], unit_ids=("u",), behavior=np.zeros((0, 2)), behavior_times=[], session="s")
    with pytest.raises(InputError, match=r"recordings\[0\].behavior = \(0, 2\)"):
        model.fit(silent)
    with pytest.raises(InputError, match=r"validation\[0\].session = 'session-5'.*session-0"):
        model.fit(recording, validation=make_recording(seed=5))
    assert list(model.sessions) == ["session-0"]


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("not a model")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "missing", "other.safetensors"):
        with pytest.raises(InputError, match="path"):
            POSSM.load(tmp_path / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, metadata: metadata.pop("config"), "POSSMConfig"),
        (lambda tensors, metadata: metadata.pop("vocabulary"), "Vocabulary"),
        (lambda tensors, metadata: tensors.pop("unit_embedding"), "unit_embedding"),
        (lambda tensors, metadata: tensors.pop("readout.output.bias"), "readout.output.bias"),
        (lambda tensors, metadata: tensors.clear(), "weights of its configuration"),
        (lambda tensors, metadata: tensors.update(unit_scale=torch.ones(3)), "unit_scale"),
        (lambda tensors, metadata: tensors.update(extra=torch.ones(3)), "extra"),
        (lambda tensors, metadata: tensors["encoder.latent"].fill_(torch.nan), r"damaged: encoder\.latent"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path: Path, damage: Callable, message: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    model = POSSM(dim=32, rnn_dim=8)
    model.add_session(make_recording())
    model.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    damage(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(InputError, match=message):
        POSSM.load(path)


def test_output_times_may_come_in_any_order_across_trials() -> None:
    whole = make_recording()
    recording = SpikeRecording(
        whole.times,
        whole.units,
        unit_ids=whole.unit_ids,
        behavior=whole.behavior,
        behavior_times=whole.behavior_times,
        session=whole.session,
        trials=np.array([[0.0, 1.5], [1.5, 2.5], [2.5, 4.0]]),
    )
    model = make_model("possm-direct", "gru", recording)
    order = np.random.default_rng(0).permutation(len(recording.behavior_times))
    shuffled = model.predict(recording, at=recording.behavior_times[order])
    np.testing.assert_array_equal(shuffled, model.predict(recording)[order])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_changing_later_spikes_changes_no_earlier_output(name: str, backbone: str) -> None:
    recording, at = make_recording(duration=1.0), np.array([0.1, 0.449, 0.451, 0.9])
    model = make_model(name, backbone, recording)
    before = model.predict(recording, at=at)
    units = np.where(recording.times >= 0.45, (recording.units + 1) % 9, recording.units)
    changed = SpikeRecording(
        recording.times,
        units,
        unit_ids=recording.unit_ids,
        behavior=recording.behavior,
        behavior_times=recording.behavior_times,
        session=recording.session,
    )
    difference = np.abs(model.predict(changed, at=at) - before).max(1)
    assert (difference[:2] == 0).all()
    assert (difference[2:] > 1e-6).all()


@pytest.mark.parametrize("start", [0.0, 1e6, 1.7e9])
def test_windows_hold_every_spike_once_in_the_chunk_it_opens(start: float) -> None:
    """Spikes on chunk edges, as summed, multiplied and one rounding beside, in windows laid end to end."""
    edges = start + np.concatenate([np.arange(60) * CHUNK_S, np.cumsum(np.full(59, CHUNK_S))])
    times = np.sort(np.concatenate([edges, np.nextafter(edges, np.inf), np.nextafter(edges[1:], -np.inf)]))
    recording = SpikeRecording(
        times,
        np.zeros(len(times), int),
        unit_ids=("u",),
        behavior=np.zeros((1, 1)),
        behavior_times=[start],
        session="s",
        trials=[[start, start + 60 * CHUNK_S]],
    )
    counts = [
        np.bincount(window.chunk, minlength=window.n_chunks)
        for b in range(0, 60, 7)
        for window in [
            cut_window(recording, start + b * CHUNK_S, stop=start + min(b + 7, 60) * CHUNK_S, chunk_s=CHUNK_S)
        ]
    ]
    expected = recording.binned(CHUNK_S)[0].counts[:, 0]
    np.testing.assert_array_equal(np.concatenate(counts), expected)
    assert expected.sum() == recording.binned(10.0)[0].counts.sum()


def test_a_spike_in_a_last_chunk_shorter_than_the_edge_tolerance_is_kept() -> None:
    start, stop = 0.0, 0.1 + 0.5e-9
    recording = SpikeRecording(
        [0.1 - 0.8e-9], [0], unit_ids=("u",), behavior=[[1.0]], behavior_times=[0.1 - 0.8e-9], session="s",
        trials=[[start, stop]],
    )  # fmt: skip
    window = cut_window(recording, start, stop=stop, chunk_s=CHUNK_S)
    assert (window.n_chunks, window.chunk.tolist(), window.query_chunk.tolist()) == (2, [1], [1])


def test_bins_longer_than_the_chunks_are_refused_before_any_work() -> None:
    recording = make_recording()
    model = make_model("possm-ss", "gru", recording)
    coarse = SpikeRecording.from_counts(
        np.ones((8, 9), int), 0.1, behavior=np.zeros((8, 2)), unit_ids=recording.unit_ids, session=recording.session
    )
    for call in (model.predict, model.score):
        with pytest.raises(InputError, match=r"chunk_s = 0.05.*chunk_s=0.1"):
            call(coarse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_in_another_type_predicts_and_is_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    recording = make_recording(duration=1.0)
    model = POSSM.from_preset("possm-direct", auxiliary_dim=0)
    model.add_session(recording)
    expected = model.predict(recording)
    model.to(dtype).save(tmp_path / "model")
    loaded = POSSM.load(tmp_path / "model")
    assert loaded.unit_embedding.dtype == dtype
    np.testing.assert_array_equal(loaded.predict(recording), model.predict(recording))
    np.testing.assert_allclose(model.predict(recording), expected, atol=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_predict_carries_the_state_from_block_to_block_and_gives_the_behavior_s_units(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = make_recording(duration=2.03)
    model = make_model(name, "gru", recording)
    model.target_mean, model.target_std = torch.tensor([5.0, -3.0]).double(), torch.tensor([2.0, 7.0]).double()
    window = cut_window(recording, 0.0, stop=2.03, chunk_s=CHUNK_S)
    with torch.no_grad():
        normalized, _ = model(collate([window], [0], [0]))
    monkeypatch.setattr(possm, "BLOCK_CHUNKS", 7)
    np.testing.assert_allclose(
        model.predict(recording), normalized.numpy() * [2.0, 7.0] + [5.0, -3.0], rtol=0, atol=1e-10
    )


def test_a_session_added_after_loading_is_drawn_as_before_saving(tmp_path: Path) -> None:
    first, second = make_recording(seed=0), make_recording(seed=1)
    model = POSSM(dim=32, rnn_dim=8, seed=4)
    model.add_session(first)
    model.save(tmp_path / "model")
    loaded = POSSM.load(tmp_path / "model")
    for each in (model, loaded):
        each.add_session(second)
    assert torch.equal(model.unit_embedding, loaded.unit_embedding)
    assert not torch.equal(model.unit_embedding[:9], model.unit_embedding[9:])
