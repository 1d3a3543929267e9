"""A human structural connectome with parcel coordinates and intrinsic timescales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from commissure.datasets.fetching import fetch

__all__ = ["Connectome", "hcp_s400"]


@dataclass(frozen=True, eq=False)
class Connectome:
    """Weighted undirected network of brain regions: `weights` symmetric with zero diagonal, `coordinates` in mm."""

    weights: Float[np.ndarray, "n_regions n_regions"]
    coordinates: Float[np.ndarray, "n_regions 3"]
    timescales: Float[np.ndarray, " n_regions"]  # ms


def hcp_s400() -> Connectome:
    """Consensus connectome of the Human Connectome Project, 400 cortical parcels of Schaefer et al. (2018).

    Weights lie in [0, 1], 6.2 % of the entries are not zero; the first 200 parcels are the left hemisphere (x < 0).
    The timescales (10.7 to 43.3 ms) come from magnetoencephalography.  Source: Milisav et al., repository of the
    catalog's row.
    """
    weights, coordinates, timescales = (
        np.load(fetch(f"hcp-s400/{name}.npy"), allow_pickle=False).astype(np.float64)
        for name in ("SC_wei_HCP_s400", "s400_coords", "parc_timescales")
    )
    return Connectome(weights, coordinates, timescales)
