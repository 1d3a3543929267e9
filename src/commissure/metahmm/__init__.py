"""MetaHMM: families of hidden Markov models built from shared blocks, to measure and to improve in-context learning.

    from commissure.metahmm import MetaHMM
    env = MetaHMM.from_preset("small", seed=15)
    split = env.split(1000, seed=0)
    env.sample(split.train[:256], 200, seed=0).tokens

arXiv 2506.16288.
"""

from __future__ import annotations

from commissure.metahmm.config import MetaHMMConfig
from commissure.metahmm.data import SequenceDataset
from commissure.metahmm.environment import MetaHMM
from commissure.metahmm.factors import HeldOutPair, Split
from commissure.metahmm.sample import Sequences

__all__ = ["HeldOutPair", "MetaHMM", "MetaHMMConfig", "SequenceDataset", "Sequences", "Split"]
