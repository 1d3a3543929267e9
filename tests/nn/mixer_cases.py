"""The mixers of `commissure.nn` under the laws: sizes that cross every chunk boundary, and the defaults."""

from __future__ import annotations

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

CASES = [
    ("attention", lambda dim: Attention(dim, heads=2).double()),
    ("attention-rotary", lambda dim: Attention(dim, heads=3, head_dim=4, rotary=True).double()),
    ("attention-window", lambda dim: Attention(dim, heads=2, window=3, rotary=False).double()),
    ("gru", lambda dim: GRU(dim).double()),
    ("s4d", lambda dim: S4D(dim).double()),
    ("s4d-chunks", lambda dim: S4D(dim, d_state=6, chunk=3).double()),
    ("mamba", lambda dim: Mamba(dim).double()),
    ("mamba-small", lambda dim: Mamba(dim, expand=1, d_state=3, d_conv=1, dt_rank=2).double()),
    ("gated-linear", lambda dim: GatedLinearAttention(dim, heads=2, chunk_size=3).double()),
    ("gated-linear-forget", lambda dim: GatedLinearAttention(dim, value_dim=4, input_gate=False, conv_size=2).double()),
    ("deltanet", lambda dim: DeltaNet(dim, heads=2, value_dim=4, chunk_size=3).double()),
    ("gated-deltanet", lambda dim: GatedDeltaNet(dim, heads=2, chunk_size=4).double()),
    ("gated-deltanet-plain", lambda dim: GatedDeltaNet(dim, head_dim=4, conv_size=1).double()),
    ("mlstm", lambda dim: MLSTM(dim, heads=2, value_dim=4, chunk_size=3).double()),
    ("rg-lru", lambda dim: RGLRU(dim).double()),
    ("rg-lru-narrow", lambda dim: RGLRU(dim, width=0.5, conv_size=1).double()),
    ("rg-lru-gate-blocks", lambda dim: RGLRU(dim, width=1.0, gate_blocks=2).double()),
    ("stack", lambda dim: Stack(["gru", "attention", "s4d"], dim, heads=1, positions=32, mlp="swiglu").double()),
    ("mesa", lambda dim: MesaLayer(dim, heads=2).double()),
    ("mesa-wide-values", lambda dim: MesaLayer(dim, heads=2, head_dim=3, value_dim=5, conv_size=1).double()),
    ("mesa-no-cap", lambda dim: MesaLayer(dim, heads=1, forget_cap=None, silu=False, output_norm=False).double()),
    ("mesa-block-rls", lambda dim: MesaLayer(dim, heads=2, solver="block_rls").double()),
    ("mesa-sequential", lambda dim: MesaLayer(dim, heads=2, solver="sequential").double()),
]
