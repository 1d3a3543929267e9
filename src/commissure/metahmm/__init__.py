"""MetaHMM: families of hidden Markov models with their exact Bayes optimum, and predictors that approach it.

    from commissure.metahmm import BayesOracle, MetaHMM, evaluate_divergence
    env = MetaHMM.from_preset("small", seed=15)
    tokens = env.sample(env.split(1000, seed=15).val[:8], 200, seed=0).tokens
    told = BayesOracle(env)(tokens)              # the optimal prediction and the task entropy after every prefix

Predictors are trained by `commissure.metahmm.fit.fit`.  Names load on first use, so that the command line shows its
help without torch.  arXiv 2506.16288.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commissure.metahmm.conditional import ExactConditional, FactorEmbedding, SoftPrefix, pooled_codes
    from commissure.metahmm.config import MetaHMMConfig
    from commissure.metahmm.data import SequenceDataset
    from commissure.metahmm.divergence import Divergence, DivergenceRow, evaluate_divergence
    from commissure.metahmm.environment import MetaHMM
    from commissure.metahmm.factors import HeldOutPair, Split
    from commissure.metahmm.filter import HMMFilter
    from commissure.metahmm.monte_carlo import EntropyGate, MonteCarloOutput, MonteCarloPredictor
    from commissure.metahmm.oracle import BayesOracle, OraclePredictions
    from commissure.metahmm.sample import Sequences
    from commissure.metahmm.samplers import FactorPosterior, LatentFlow, OraclePosterior
    from commissure.metahmm.saved import load_part, save_part
    from commissure.metahmm.test_time import ComputeRow, compute_curve
    from commissure.metahmm.trained import Setting, Trained

# Where the names are.
_MODULES = (
    "config",
    "factors",
    "sample",
    "environment",
    "data",
    "oracle",
    "filter",
    "divergence",
    "conditional",
    "samplers",
    "monte_carlo",
    "saved",
    "test_time",
    "trained",
)

__all__ = [
    "BayesOracle",
    "ComputeRow",
    "Divergence",
    "DivergenceRow",
    "EntropyGate",
    "ExactConditional",
    "FactorEmbedding",
    "FactorPosterior",
    "HMMFilter",
    "HeldOutPair",
    "LatentFlow",
    "MetaHMM",
    "MetaHMMConfig",
    "MonteCarloOutput",
    "MonteCarloPredictor",
    "OraclePosterior",
    "OraclePredictions",
    "SequenceDataset",
    "Sequences",
    "Setting",
    "SoftPrefix",
    "Split",
    "Trained",
    "compute_curve",
    "evaluate_divergence",
    "load_part",
    "pooled_codes",
    "save_part",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        modules = (importlib.import_module(f"commissure.metahmm.{path}") for path in _MODULES)
        return next(getattr(module, name) for module in modules if name in module.__all__)
    raise AttributeError(f"module 'commissure.metahmm' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
