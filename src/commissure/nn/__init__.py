"""Sequence mixers, one file each, and Stack, the one backbone and language model built from them.

Every mixer keeps the contract of `commissure.core.mixer`: `init_state`, `step`, and `forward` = the scan of `step`.
"""

from commissure.nn.attention import Attention, AttentionState
from commissure.nn.delta import DeltaNet, DeltaNetState, GatedDeltaNet
from commissure.nn.gated_linear import GatedLinearAttention, GatedLinearState
from commissure.nn.gru import GRU, GRUState
from commissure.nn.mamba import Mamba, MambaState
from commissure.nn.mesa import (
    MesaConvergenceWarning,
    MesaInfo,
    MesaLayer,
    MesaLayerState,
    MesaOutput,
    MesaState,
    mesa_attention,
)
from commissure.nn.mlstm import MLSTM, MLSTMMemory, MLSTMState
from commissure.nn.names import MixerFactory, mixer
from commissure.nn.rg_lru import RGLRU, RGLRUState
from commissure.nn.rotary import rotary_angles, rotate
from commissure.nn.s4d import S4D, S4DState
from commissure.nn.stack import Stack, StackConfig, StackState

__all__ = [
    "GRU",
    "MLSTM",
    "RGLRU",
    "S4D",
    "Attention",
    "AttentionState",
    "DeltaNet",
    "DeltaNetState",
    "GRUState",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GatedLinearState",
    "MLSTMMemory",
    "MLSTMState",
    "Mamba",
    "MambaState",
    "MesaConvergenceWarning",
    "MesaInfo",
    "MesaLayer",
    "MesaLayerState",
    "MesaOutput",
    "MesaState",
    "MixerFactory",
    "RGLRUState",
    "S4DState",
    "Stack",
    "StackConfig",
    "StackState",
    "mesa_attention",
    "mixer",
    "rotary_angles",
    "rotate",
]
