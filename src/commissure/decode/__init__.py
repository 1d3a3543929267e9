"""Neural decoding: POSSM, its streaming engine and its baselines.

    from commissure.decode import POSSM, recordings
    recording = recordings.mihi_chewie("chewie-2013-12-19")
    model = POSSM.from_preset("possm-direct", chunk_s=0.1).fit(recording)

Start with `POSSM` and `StreamingDecoder`; `WienerFilter`, `KalmanFilter`, `BinnedMLP` and `BinnedGRU` are the rivals.
"""

from commissure.decode import recordings
from commissure.decode.binned import BinnedGRU, BinnedMLP
from commissure.decode.kalman import KalmanFilter
from commissure.decode.metrics import r2_per_output, r2_score
from commissure.decode.possm import POSSM, POSSMState
from commissure.decode.presets import FitConfig, POSSMConfig
from commissure.decode.recording import SpikeRecording
from commissure.decode.simulate import simulate_reaching
from commissure.decode.streaming import Prediction, StreamingDecoder
from commissure.decode.unit_dropout import UnitDropout, UnitDropoutRate
from commissure.decode.wiener import WienerFilter
from commissure.decode.window import WindowDecoder

__all__ = [
    "POSSM",
    "BinnedGRU",
    "BinnedMLP",
    "FitConfig",
    "KalmanFilter",
    "POSSMConfig",
    "POSSMState",
    "Prediction",
    "SpikeRecording",
    "StreamingDecoder",
    "UnitDropout",
    "UnitDropoutRate",
    "WienerFilter",
    "WindowDecoder",
    "r2_per_output",
    "r2_score",
    "recordings",
    "simulate_reaching",
]
