"""Reservoirs: what does this network compute?  Hierarchical modular networks, connectomes, their nulls, their tasks.

Names load on first use, so that the command line shows its help without torch.  bioRxiv 2025.06.20.660760.
"""

from __future__ import annotations

__all__: list[str] = []
