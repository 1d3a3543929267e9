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
CHECKED = tuple(
    f"commissure.{part}"
    for part in ("core", "decode", "geometry", "mesa", "metahmm", "native", "nn", "reservoirs", "train")
)


def test_every_signature_holds_in_an_ordinary_pass() -> None:
    done = subprocess.run([sys.executable, "-W", "error", __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        "refused", "mixers", "mesa", "tasks", "metahmm", "reservoirs", "geometry", "baselines", "possm", "streams",
        "spine",
    ]  # fmt: skip


def _main() -> None:
    from jaxtyping import install_import_hook

    with install_import_hook(list(CHECKED), "__main__.check"):
        import commissure.core
        import commissure.decode
        import commissure.native.possm
        import commissure.nn  # noqa: F401
        from commissure.geometry import Trajectory  # noqa: F401 (loads every module)
        from commissure.mesa import inspect, set_test_time_compute, to_fla  # noqa: F401 (names load on first use)
        from commissure.metahmm import Trained, bench, fit, show  # noqa: F401 (Trained loads every module)
        from commissure.reservoirs import Sweep, capacity, nir, ranks, timescales  # noqa: F401 (likewise)
    for part in (
        _refused,
        _mixers,
        _mesa,
        _tasks,
        _metahmm,
        _reservoirs,
        _geometry,
        _baselines,
        _possm_and_streams,
        _spine,
    ):
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
    from commissure.nn import (
        GRU,
        MLSTM,
        RGLRU,
        S4D,
        Attention,
        DeltaNet,
        GatedDeltaNet,
        GatedLinearAttention,
        Mamba,
        MesaLayer,
        Stack,
    )

    for mixer in (Attention(8, heads=2, rotary=True), Attention(8, window=2), GRU(8), S4D(8, chunk=4), Mamba(8),
                  DeltaNet(8, heads=2), GatedDeltaNet(8, value_dim=3), GatedLinearAttention(8, heads=2, chunk_size=4),
                  GatedLinearAttention(8, input_gate=False), MLSTM(8, heads=2), RGLRU(8), RGLRU(8, gate_blocks=2),
                  MesaLayer(8, heads=2), MesaLayer(8, value_dim=3, solver="cg"),
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


def _mesa() -> None:
    import torch

    from commissure.mesa import (
        MesaNetConfig,
        build_stack,
        fla_config,
        inspect,
        load_fla,
        mesa_attention,
        set_test_time_compute,
        to_fla,
    )
    from commissure.native.mesa import mesa_solve
    from commissure.nn.delta import delta_rule, delta_rule_reference
    from commissure.nn.linear_attention import gated_linear_attention, gated_linear_attention_reference
    from commissure.nn.mesa_reference import mesa_attention_reference
    from commissure.nn.mlstm import matrix_lstm, matrix_lstm_reference

    q, k = (torch.nn.functional.normalize(torch.randn(1, 9, 2, 4), dim=-1).requires_grad_() for _ in range(2))
    v, g, lamb = torch.randn(1, 9, 2, 3), -torch.rand(1, 9, 2), torch.ones(2, 4)
    for solver in ("auto", "cholesky", "block_rls", "cg", "sequential"):
        out = mesa_attention(q, k, v, g, g.exp(), lamb, solver=solver, return_info=True)
        out.output.sum().backward()
        mesa_attention(q, k, v, g, g.exp(), lamb, initial_state=out.state, backward_solver="block_rls")
        cut = torch.tensor([0, 2, 2, 9])
        mesa_attention(q, k, v, g, g.exp(), lamb, cu_seqlens=cut, solver=solver, return_info=True)
        mesa_attention(*(x.bfloat16() for x in (q, k, v, g, g.exp(), lamb)), solver=solver)
    mesa_attention_reference(q, k, v, g, g.exp(), lamb)
    mesa_solve(*(x.detach() for x in (q, k, g, g.exp(), lamb, out.state.h_kk)), dof=True)
    for function in (gated_linear_attention, gated_linear_attention_reference, delta_rule, delta_rule_reference):
        function(q, k, v, g, g.exp(), out.state.h_kv.detach())[0].sum().backward()
    for function in (matrix_lstm, matrix_lstm_reference):
        function(q, k, v, 1 + g, g)[0].sum().backward()

    stack = build_stack(MesaNetConfig(vocab=11, dim=8, blocks=2, heads=2, head_dim=4))
    stack.step(torch.tensor([3]), stack(torch.tensor([[1, 2]]))[1])
    assert len(inspect(stack, torch.tensor([[1, 2, 3]]))) == 4
    with set_test_time_compute(stack, eps=1e-3):
        stack(torch.tensor([[1, 2]]))
    weights = to_fla(stack)
    load_fla(build_stack(fla_config(weights)), weights)
    hawk = build_stack(MesaNetConfig(vocab=11, dim=8, blocks=2, heads=2, head_dim=4, hybrid="hawk"))
    hawk(torch.tensor([[1, 2]]))
    print("mesa")


def _tasks() -> None:
    from commissure.mesa.fit import FitConfig, evaluate, fit
    from commissure.mesa.model import ModelConfig, TaskModel
    from commissure.mesa.tasks import TASKS, task

    small = {"lds": {"length": 20}, "regression": {}, "mqar": {"n_pairs": 4, "length": 32, "vocab": 64}}
    quick = FitConfig(steps=1, batch_size=2, test_size=2, validate_every=1)
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(TASKS.keys() - {"wikitext2"}):  # that one reads a downloaded file
            chosen = task(name, **small.get(name, {}))
            for mixers in (["mesa"], ["rg_lru", "gated_deltanet"]):
                result = fit(chosen, mixers, model=ModelConfig(dim=16, heads=2, head_dim=4), config=quick)
            result.model.save(Path(folder) / "model")
            evaluate(TaskModel.load(Path(folder) / "model"), chosen, n_sequences=2)
    print("tasks")


def _metahmm() -> None:
    import torch

    from commissure.metahmm import (
        BayesOracle,
        EntropyGate,
        ExactConditional,
        FactorEmbedding,
        FactorPosterior,
        HMMFilter,
        LatentFlow,
        MetaHMM,
        MonteCarloPredictor,
        OraclePosterior,
        SequenceDataset,
        Setting,
        SoftPrefix,
        Trained,
        bench,
        compute_curve,
        evaluate_divergence,
        load_part,
        save_part,
    )
    from commissure.metahmm.fit import ContextCodes, FitConfig, fit, implicit_stack
    from commissure.metahmm.sample import sample_reference
    from commissure.metahmm.show import ambiguity, facts

    for variant in ("corrected", "reference"):
        env = MetaHMM.from_preset("e64", seed=0, variant=variant)
        assert env.factors_to_task(env.task_to_factors([3, 5])).tolist() == [3, 5]
        split = env.split(8, seed=0, n_held_out_pairs=1)
        dataset = SequenceDataset(env, split.train, batch_size=3, length=(1, 5), seed=0, switch_at=(0, 4))
        drawn = dataset.batch(0)
        assert drawn.is_scored.shape == drawn.task_by_position.shape == (3, 5)
        sample_reference(env, split.ood[:2], 4, seed=0)
        facts(env)
        ambiguity(env, n_sequences=2, length=3)
        for dtype, prune, rescale in ((torch.float64, 0.0, "task"), (torch.float32, 1e-8, "joint")):
            oracle = BayesOracle(env, dtype=dtype, prune=prune, rescale=rescale, on_impossible="-inf")
            tokens, lengths = drawn.tokens, drawn.lengths
            oracle.factor_marginals(tokens, lengths)
            oracle.epistemic(tokens, lengths)
            oracle.sample_tasks(tokens, 2, seed=0, every_position=True)
            oracle.step(tokens[:, 0], oracle.init_state(3))
    BayesOracle.from_hmms(torch.ones(2, 1), torch.ones(2, 1, 1), torch.full((2, 1, 3), 1 / 3)).task_posterior(
        tokens % 3
    )
    HMMFilter(env.initial, env.transitions, env.emissions)(torch.ones(1, 2, env.n_obs, dtype=torch.float64))
    setting, quick = Setting.from_preset("e64", seed=0), FitConfig(steps=1, batch_size=2, length=4)
    env, model = setting.environment(), implicit_stack("cpu", vocab=10)
    fit(model, env, config=quick)
    told = SoftPrefix(implicit_stack("cpu", vocab=10, mixer="gru"), 8, embedding=FactorEmbedding(env.factor_sizes, 8))
    sampler = FactorPosterior(implicit_stack("cpu", vocab=10, mixer="gru"), env.factor_sizes)
    by_code, codes = SoftPrefix(implicit_stack("cpu", vocab=10), 64), ContextCodes(env, model, length=3)
    flow = LatentFlow(implicit_stack("cpu", vocab=10), 64)
    for part, code in ((told, None), (sampler, None), (by_code, codes), (flow, codes)):
        fit(part, env, codes=code, config=quick)
    gate = {"gate": EntropyGate(0.1), "fallback": model}
    for predictor in (
        MonteCarloPredictor(told, sampler, n_samples=3, weighting="importance", **gate),
        MonteCarloPredictor(told, sampler, n_samples=3, weighting="smc"),
        MonteCarloPredictor(by_code, flow, n_samples=2),
        MonteCarloPredictor(ExactConditional(env), OraclePosterior(BayesOracle(env)), n_samples=2, weighting="smc"),
    ):
        predictor.flops_per_token(predictor(tokens))
        evaluate_divergence(predictor, tokens, oracle=BayesOracle(env), n_resamples=100)
    compute_curve(predictor, tokens, oracle=BayesOracle(env), n_samples=(1, 2), n_resamples=100)
    bench.bench_oracle("tiny", length=3, n_sequences=2, repeats=1)
    bench.bench_sampler("tiny", batch_size=2, length=3, repeats=1)
    with tempfile.TemporaryDirectory() as folder:
        Trained(model, setting, env).save(Path(folder) / "model")
        Trained.load(Path(folder) / "model")
        for part in (told, sampler, flow):
            save_part(part, Path(folder) / "part")
            load_part(Path(folder) / "part")
    print("metahmm")


def _geometry() -> None:
    import numpy as np
    import torch
    from torch import nn

    from commissure import geometry
    from commissure.geometry.similarity import pair_moments

    for name in geometry.__all__:
        assert getattr(geometry, name) is not None
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    for metric in (geometry.rankme, geometry.participation_ratio, geometry.stable_rank, geometry.matrix_entropy):
        metric(rows)
        metric(rows.numpy())
    geometry.renyi_rank(geometry.spectrum(rows, frame="unit"), order=3)
    geometry.alpha_req(rows, fit_range=(1, 5))
    geometry.AlphaReQ(fit_range="auto").fit(torch.diag(1 / torch.arange(1.0, 40)))
    geometry.RankMe().partial_fit(rows.tolist()).partial_fit(rows.numpy())
    geometry.ParticipationRatio(unbiased=True).fit(rows)
    geometry.TwoNN().fit(rows)
    geometry.estimate(geometry.rankme, geometry.folds_of(rows, n_folds=4), correction="half")
    geometry.linear_cka(rows, rows[:, :2])
    geometry.principal_angles(pair_moments(rows, rows), dim=5, k=2)
    geometry.lidar(rows.view(10, 4, 5))
    geometry.two_nn(rows)
    geometry.prompt_entropy(rows.view(4, 10, 5))
    geometry.curvature(rows.view(4, 10, 5), mask=torch.ones(4, 10, dtype=torch.bool))
    geometry.entropy_change(geometry.spectrum(rows), geometry.spectrum(2 * rows))
    geometry.block_ledger(rows, rows.flip(0))
    geometry.segment_phases([0, 1, 2, 3], [4.0, 2.0, 3.0, 5.0], stderr=[0.1] * 4, alpha=[1.0, 2.0, 1.5, 1.0])
    geometry.run_toy(n_steps=3)
    tokens = torch.tensor([[0, 1, 0]])
    gram = geometry.InfinityGram([tokens[0].numpy()])
    geometry.infinity_gram_alignment(np.array([[-1.0, -2.0, -3.0]]), gram.next_tokens(tokens.numpy()))
    setting = geometry.TinySetting(vocab=300, steps=2, looks=2, n_contexts=40, dim=8)
    geometry.train_tiny(np.arange(400) % 290, setting, seed=0)
    recorder = geometry.GeometryRecorder([rows], sites=["0"], steps=geometry.log_steps(5), fit_range=(1, 2))
    recorder.on_step(0, nn.Sequential(nn.Linear(5, 2)))
    recorder.trajectory.series("0")
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh())
    with geometry.trace(model, sites=["0", "1:input"], pooling=["all"]) as traced:
        model(rows)
    traced.report(fit_range=(1, 2))
    with geometry.ablate_subspace(model, "0", traced.accumulators["0", "all", "raw"].moments, remove_top=1):
        model(rows)
    print("geometry")


def _reservoirs() -> None:
    import numpy as np
    import torch

    from commissure.reservoirs import (
        BlockTree,
        Connectome,
        HierarchicalSBM,
        IOMap,
        LIFReservoir,
        Reservoir,
        RidgeReadout,
        Sweep,
        evaluate,
        louvain_hierarchy,
        lyapunov,
        module_r2,
        regime,
        rewire,
        spectral_radius,
    )
    from commissure.reservoirs.capacity import information_processing_capacity, linear_memory_capacity, memory_capacity
    from commissure.reservoirs.nir import from_nir, to_nir
    from commissure.reservoirs.ranks import generalization_rank, kernel_rank, participation_ratio
    from commissure.reservoirs.tasks import ChaoticForecast, MemoryCapacity, Multitask, NonlinearTransform
    from commissure.reservoirs.timescales import lag_products, timescales

    model = HierarchicalSBM(BlockTree.balanced(depth=2, leaf_size=12), prune=0.1)
    network = model.sample(seed=0)
    for preserve in ("degree", "degree+modules", "degree+levels"):
        rewire(network, preserve=preserve, strengths=True, keep_connected=True, seed=0)
    undirected = Connectome.from_array(network.to_array() + network.to_array().T, orientation=None)
    louvain_hierarchy(undirected, n_runs=2, seed=0)
    assert spectral_radius(network.weights).value > 0
    io = IOMap.from_modules(network.modules(), inputs=[0], n_outputs=5)
    memory = MemoryCapacity(max_delay=3, length=60, warmup=5)
    for task in (memory, NonlinearTransform(), ChaoticForecast(system="logistic", length=60)):
        scores = evaluate(
            network,
            task,
            io=[io],
            spectral_radius=[0.5, None],
            penalties=[1e-3, 1.0],
            read_bits=[None, 8],
            lyapunov=True,
        )
        module_r2(scores)
    Multitask(n_inputs=2).data(0, "train")
    found = Sweep(models={"a": model, "b": undirected.with_levels(network.levels)}, spectral_radius=[0.5], seeds=[0, 1])
    found.run(memory, workers=0).compare("a", "b")
    for dtype in (torch.float32, torch.float64):
        reservoir = Reservoir(network, inputs=2, leak=0.5, state_noise=0.1, weight_bits=6, state_bits=5, dtype=dtype)
        x = torch.randn(2, 30, 2, dtype=dtype)
        states, state = reservoir(x, lengths=torch.tensor([30, 7]))
        reservoir.step(x[:, 0], state)
    plain = Reservoir(network, inputs=1, dtype=torch.float64)
    series = np.random.default_rng(0).uniform(-1, 1, (200, 1))
    states = plain(torch.from_numpy(series)[None])[0][0].numpy()
    lyapunov(plain, series, k=2)
    regime(plain, series)
    readout = RidgeReadout(penalties=[0.1, 1.0], select="loo").fit(states, series)
    assert readout.predict(states).shape == series.shape
    timescales(states)
    timescales(lag_products(states[100:], 5, before=lag_products(states[:100], 5)))
    participation_ratio(states)
    kernel_rank(plain, n_patterns=4)
    generalization_rank(plain, n_patterns=4)
    memory_capacity(states, series[:, 0], max_delay=4)
    information_processing_capacity(states[:, :4], series[:, 0], max_delays=[3, 2])
    linear_memory_capacity(
        torch.from_numpy(network.to_array()) * 0.01, torch.ones(network.n_nodes, dtype=torch.float64), max_delay=5
    )
    spiking = LIFReservoir(network, refractory_period=0.0, output="spikes")
    spiking(torch.ones(1, 5, 1))
    with tempfile.TemporaryDirectory() as folder:
        to_nir(spiking, Path(folder) / "spiking.nir")
        from_nir(Path(folder) / "spiking.nir")
    print("reservoirs")


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
