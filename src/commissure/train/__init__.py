"""The training loop: AdamW, one-cycle schedule, gradient clipping, early stop, one seed."""

from commissure.train.loop import TrainConfig, TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
