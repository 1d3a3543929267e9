"""Real data by name: a pinned catalog, checked downloads, arrays out.

`fetch(name)` gives the path of a file whose SHA-256 has been checked; the loaders give frozen dataclasses of arrays.
With the environment variable `COMMISSURE_DATA=DIR` files are read from DIR and nothing is downloaded.
"""

from commissure.datasets.catalog import CATALOG, Source
from commissure.datasets.connectome import Connectome, hcp_s400
from commissure.datasets.fetching import available, cache_folder, fetch
from commissure.datasets.reaching import MazeTrial, ReachingTrials, mc_maze_trial, mihi_chewie
from commissure.datasets.text import Text, python_topics, wikitext2

__all__ = [
    "CATALOG",
    "Connectome",
    "MazeTrial",
    "ReachingTrials",
    "Source",
    "Text",
    "available",
    "cache_folder",
    "fetch",
    "hcp_s400",
    "mc_maze_trial",
    "mihi_chewie",
    "python_topics",
    "wikitext2",
]
