"""Geometry of representations: how many directions a model uses, site by site and step by step.

    from commissure.geometry import rankme, segment_phases, trace
    with trace(model, sites=["layers.*", "lm_head:input"], pooling=("last", "all")) as traced:
        for batch in batches:
            model(**batch)
    traced.report()                               # RankMe, alpha and others, as rows are and as directions alone
    segment_phases(steps, ranks)                  # warmup, entropy-seeking, compression-seeking

Names load on first use, so that the command line shows its help without torch.  arXiv 2509.23024.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commissure.geometry.ablation import ablate_subspace
    from commissure.geometry.accumulator import CovarianceAccumulator
    from commissure.geometry.attribution import EntropyChange, entropy_change
    from commissure.geometry.checkpoints import CheckpointSweep, FailedCheckpoint, SweepReport
    from commissure.geometry.comparison import GeometryChange, compare
    from commissure.geometry.discriminant import lidar
    from commissure.geometry.effective_rank import matrix_entropy, participation_ratio, rankme, renyi_rank, stable_rank
    from commissure.geometry.estimation import Estimate, estimate, folds_of
    from commissure.geometry.estimators import AlphaReQ, ParticipationRatio, RankMe, TwoNN
    from commissure.geometry.infinity_gram import InfinityGram, infinity_gram_alignment
    from commissure.geometry.ledger import BlockLedger, block_ledger
    from commissure.geometry.neighbors import two_nn
    from commissure.geometry.phases import Phase, segment_phases
    from commissure.geometry.power_law import PowerLaw, alpha_req
    from commissure.geometry.pretrained import PretrainedCheckpoints, text_batches
    from commissure.geometry.recorder import GeometryRecorder, log_steps
    from commissure.geometry.sequences import curvature, prompt_entropy
    from commissure.geometry.similarity import linear_cka, principal_angles
    from commissure.geometry.spectra import Spectrum, spectrum
    from commissure.geometry.tiny import TinyRun, TinySetting, byte_pair_tokens, train_tiny
    from commissure.geometry.toy import ToySetting, run_toy
    from commissure.geometry.tracing import TraceRow, trace
    from commissure.geometry.trajectory import Series, Trajectory, TrajectoryRow

# Where the names are.
_MODULES = (
    "ablation",
    "accumulator",
    "attribution",
    "checkpoints",
    "comparison",
    "discriminant",
    "effective_rank",
    "estimation",
    "estimators",
    "infinity_gram",
    "ledger",
    "neighbors",
    "phases",
    "power_law",
    "pretrained",
    "recorder",
    "sequences",
    "similarity",
    "spectra",
    "tiny",
    "toy",
    "tracing",
    "trajectory",
)

__all__ = [
    "AlphaReQ",
    "BlockLedger",
    "CheckpointSweep",
    "CovarianceAccumulator",
    "EntropyChange",
    "Estimate",
    "FailedCheckpoint",
    "GeometryChange",
    "GeometryRecorder",
    "InfinityGram",
    "ParticipationRatio",
    "Phase",
    "PowerLaw",
    "PretrainedCheckpoints",
    "RankMe",
    "Series",
    "Spectrum",
    "SweepReport",
    "TinyRun",
    "TinySetting",
    "ToySetting",
    "TraceRow",
    "Trajectory",
    "TrajectoryRow",
    "TwoNN",
    "ablate_subspace",
    "alpha_req",
    "block_ledger",
    "byte_pair_tokens",
    "compare",
    "curvature",
    "entropy_change",
    "estimate",
    "folds_of",
    "infinity_gram_alignment",
    "lidar",
    "linear_cka",
    "log_steps",
    "matrix_entropy",
    "participation_ratio",
    "principal_angles",
    "prompt_entropy",
    "rankme",
    "renyi_rank",
    "run_toy",
    "segment_phases",
    "spectrum",
    "stable_rank",
    "text_batches",
    "trace",
    "train_tiny",
    "two_nn",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        modules = (importlib.import_module(f"commissure.geometry.{path}") for path in _MODULES)
        return next(getattr(module, name) for module in modules if name in module.__all__)
    raise AttributeError(f"module 'commissure.geometry' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
