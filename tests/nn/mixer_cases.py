"""The mixers of `commissure.nn` under the laws: sizes that cross every chunk boundary, and the defaults."""

from __future__ import annotations

from commissure.nn import GRU, S4D, Attention, Mamba, Stack
from commissure.nn.mesa import MesaLayer

CASES = [
    ("attention", lambda dim: Attention(dim, heads=2).double()),
    ("attention-rotary", lambda dim: Attention(dim, heads=3, head_dim=4, rotary=True).double()),
    ("attention-window", lambda dim: Attention(dim, heads=2, window=3, rotary=False).double()),
    ("gru", lambda dim: GRU(dim).double()),
    ("s4d", lambda dim: S4D(dim).double()),
    ("s4d-chunks", lambda dim: S4D(dim, d_state=6, chunk=3).double()),
    ("mamba", lambda dim: Mamba(dim).double()),
    ("mamba-small", lambda dim: Mamba(dim, expand=1, d_state=3, d_conv=1, dt_rank=2).double()),
    ("stack", lambda dim: Stack(["gru", "attention", "s4d"], dim, heads=1, positions=32, mlp="swiglu").double()),
    ("mesa", lambda dim: MesaLayer(dim, heads=2).double()),
    ("mesa-wide-values", lambda dim: MesaLayer(dim, heads=2, head_dim=3, value_dim=5, conv_size=1).double()),
    ("mesa-no-cap", lambda dim: MesaLayer(dim, heads=1, forget_cap=None, silu=False, output_norm=False).double()),
    ("mesa-block-rls", lambda dim: MesaLayer(dim, heads=2, solver="block_rls").double()),
    ("mesa-sequential", lambda dim: MesaLayer(dim, heads=2, solver="sequential").double()),
]
