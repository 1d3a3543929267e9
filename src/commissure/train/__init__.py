"""The training loop: AdamW, one-cycle schedule, clipping, early stop, one seed, checkpoints, several processes."""

from commissure.train.checkpoint import Checkpoint
from commissure.train.loop import TrainConfig, TrainResult, train
from commissure.train.parallel import Processes, Strategy, joined

__all__ = ["Checkpoint", "Processes", "Strategy", "TrainConfig", "TrainResult", "joined", "train"]
