"""The human connectome of the paper's empirical arm as a `Connectome`, and the timescales measured in the same parcels.

Data: `commissure.datasets.hcp_s400`; acknowledge the Human Connectome Project.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from commissure import datasets
from commissure.reservoirs.connectome import Connectome

__all__ = ["hcp_s400", "meg_timescales"]


def hcp_s400() -> Connectome:
    """Group-consensus structural connectome of 400 cortical parcels, undirected, with coordinates and without levels.

    Its modules: `with_levels(louvain_hierarchy(hcp_s400(), seed=0).levels)`.
    """
    data = datasets.hcp_s400()
    return Connectome.from_array(
        data.weights, orientation=None, coordinates=data.coordinates, provenance="datasets.hcp_s400()"
    )


def meg_timescales() -> Float[np.ndarray, " n_regions"]:
    """Intrinsic timescale of each parcel of `hcp_s400` in ms, from magnetoencephalography at rest."""
    return datasets.hcp_s400().timescales
