"""Real recordings ready to decode: the arrays of `commissure.datasets` as `SpikeRecording`."""

from __future__ import annotations

import numpy as np

from commissure import datasets
from commissure.decode.recording import SpikeRecording

__all__ = ["mc_maze_trial", "mihi_chewie"]


def mihi_chewie(session: str = "chewie-2013-10-03", bin_s: float = 0.1) -> SpikeRecording:
    """Center-out reaches of monkeys Chewie and Mihi, one trial a segment; decode with chunks of `bin_s` seconds.

    Sessions: "chewie-2013-10-03" (`bin_s` 0.1 or 0.05), "chewie-2013-12-19" and "mihi-2014-03-03" (0.1).
    `behavior` is the hand velocity in cm/s, one sample a bin; `auxiliary` the hand position in cm as recorded (not
    centered: its mean is near (5, -35)), None for Mihi, whose positions the source leaves out.

    The source kept movement only (speed above 5 cm/s), so trials are short (3 to 9 bins of 100 ms).  They are laid
    one after the other with a second between them, and the bins of a trial side by side, also where slow bins were
    removed in its middle (12, 7 and 5 trials of the three sessions); `datasets.mihi_chewie` tells where.
    """
    trials = datasets.mihi_chewie(session, bin_s)
    return SpikeRecording.from_counts(
        trials.counts,
        trials.bin_s,
        session=trials.session,
        subject=trials.subject,
        behavior=trials.velocity,
        auxiliary=trials.position,
    )


def mc_maze_trial() -> SpikeRecording:
    """One trial of the maze task at its true spike times, to replay: 182 units, 3.236 s from 2282.6 s on.

    A spike's time is the timestamp of its millisecond.  `behavior` is the hand velocity in mm/s at 1 kHz, `auxiliary`
    the hand position in mm.
    """
    trial = datasets.mc_maze_trial()
    rows, units = np.nonzero(trial.spikes)
    return SpikeRecording(
        trial.times[rows],
        units,
        unit_ids=trial.unit_ids,
        behavior=trial.hand_velocity,
        behavior_times=trial.times,
        session="mc-maze-trial-748",
        subject="jenkins",
        auxiliary=trial.hand_position,
    )
