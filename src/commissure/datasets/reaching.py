"""Monkeys that reach: three sessions of binned counts, and one trial at its true spike times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from commissure.core.errors import InputError
from commissure.datasets.array_cache import cached_arrays
from commissure.datasets.graph_pickle import read_graphs

__all__ = ["MIHI_CHEWIE_SESSIONS", "MazeTrial", "ReachingTrials", "mc_maze_trial", "mihi_chewie"]

MIHI_CHEWIE_SESSIONS: Mapping[tuple[str, float], str] = {
    ("chewie-2013-10-03", 0.05): "mihi-chewie/full-chewie-10032013-bin0.05-vel_thresh5.00.pkl",
    ("chewie-2013-10-03", 0.1): "mihi-chewie/full-chewie-10032013-bin0.10-vel_thresh5.00.pkl",
    ("chewie-2013-12-19", 0.1): "mihi-chewie/full-chewie-12192013-bin0.10-vel_thresh5.00.pkl",
    ("mihi-2014-03-03", 0.1): "mihi-chewie/full-mihi-03032014-bin0.10-vel_thresh5.00.pkl",
}


@dataclass(frozen=True, eq=False)
class ReachingTrials:
    """One session of center-out reaches in bins of `bin_s` seconds; each tuple has one array a trial.

    `timestep` numbers the bins of a trial as recorded: a step of more than one is a place where slow bins were removed.
    `position` and `acceleration` are None where the source holds zeros only (Mihi).  `target` is 0-7, clockwise from
    straight ahead (90, 45, 0, ... degrees).
    """

    session: str
    subject: str
    bin_s: float
    counts: tuple[Int[np.ndarray, "time n_units"], ...]
    velocity: tuple[Float[np.ndarray, "time 2"], ...]  # cm/s
    position: tuple[Float[np.ndarray, "time 2"], ...] | None  # cm
    acceleration: tuple[Float[np.ndarray, "time 2"], ...] | None  # cm/s^2
    force: tuple[Float[np.ndarray, "time 2"], ...]  # unit not documented by the source
    timestep: tuple[Int[np.ndarray, " time"], ...]
    target: Int[np.ndarray, " n_trials"]


@dataclass(frozen=True, eq=False)
class MazeTrial:
    """One trial of the maze task, a row a millisecond; `spikes` is 0 or 1.  Positions in mm, velocity in mm/s."""

    times: Float[np.ndarray, " time"]  # seconds
    spikes: UInt8[np.ndarray, "time n_units"]
    unit_ids: tuple[str, ...]
    hand_velocity: Float[np.ndarray, "time 2"]
    hand_position: Float[np.ndarray, "time 2"]
    cursor_position: Float[np.ndarray, "time 2"]
    eye_position: Float[np.ndarray, "time 2"]


def mihi_chewie(session: str = "chewie-2013-10-03", bin_s: float = 0.1) -> ReachingTrials:
    """Motor cortex (M1) of monkeys Chewie and Mihi, center-out reaches, binned (Dyer et al. 2017; arXiv:2102.10106).

    | session | bin_s | trials | bins | units |
    |---|---|---|---|---|
    | chewie-2013-10-03 | 0.05 | 159 | 1,731 | 174 |
    | chewie-2013-10-03 | 0.1 | 159 | 895 | 174 |
    | chewie-2013-12-19 | 0.1 | 180 | 835 | 155 |
    | mihi-2014-03-03 | 0.1 | 209 | 1,082 | 187 |

    Only bins with a speed above 5 cm/s were kept by the source: a trial begins and ends in movement, and in 13, 12, 7
    and 5 trials of these files bins are missing in the middle (see `ReachingTrials.timestep`).  Velocity is the
    derivative of position (slope .98 at 50 ms), hence cm and cm/s.  Counts are the source's rates times `bin_s`,
    integers exactly.
    """
    names = MIHI_CHEWIE_SESSIONS
    if (session, bin_s) not in names:
        known = ", ".join(f"({name!r}, {width})" for name, width in names)
        raise InputError("(session, bin_s)", (session, bin_s), f"one of {known}")
    fields = ("counts", "velocity", "position", "acceleration", "force", "timestep", "target", "lengths")
    arrays = cached_arrays(names[session, bin_s], lambda path: _read_mihi_chewie(path, bin_s), fields)
    edges = np.cumsum(arrays["lengths"])[:-1]
    per_trial = {name: tuple(np.split(arrays[name], edges)) for name in fields[:6]}
    return ReachingTrials(
        session,
        session.partition("-")[0],
        bin_s,
        per_trial["counts"],
        per_trial["velocity"],
        per_trial["position"] if np.any(arrays["position"]) else None,
        per_trial["acceleration"] if np.any(arrays["acceleration"]) else None,
        per_trial["force"],
        per_trial["timestep"],
        arrays["target"],
    )


def mc_maze_trial() -> MazeTrial:
    """One trial (number 748) of the maze task: 182 units of M1 and PMd at 1 ms, 3.236 s (arXiv:2109.04463).

    Timestamps start at 2282.6 s; 1,654 spikes, some units silent.  Hand velocity is exactly the derivative of hand
    position; the sizes (a reach of 130, a peak speed of 979) make them mm and mm/s.
    """
    fields = ("times", "spikes", "unit_ids", "hand_velocity", "hand_position", "cursor_position", "eye_position")
    arrays = cached_arrays("mc-maze/trial_748_data.csv", _read_mc_maze, fields)
    return MazeTrial(
        times=arrays["times"],
        spikes=arrays["spikes"],
        unit_ids=tuple(arrays["unit_ids"].tolist()),
        hand_velocity=arrays["hand_velocity"],
        hand_position=arrays["hand_position"],
        cursor_position=arrays["cursor_position"],
        eye_position=arrays["eye_position"],
    )


def _read_mihi_chewie(path: Path, bin_s: float) -> dict[str, np.ndarray]:
    graphs = read_graphs(path, "x", "vel", "pos", "acc", "force", "timestep", "y")
    columns = {name: np.concatenate([graph[name] for graph in graphs]) for name in graphs[0]}
    spikes = columns["x"].astype(np.float64) * bin_s
    counts = np.round(spikes)
    if np.abs(spikes - counts).max() > 1e-4 or counts.min() < 0:  # float32 rates; exact in the pinned files
        raise InputError("path", str(path), f"rates that are whole numbers of spikes in bins of {bin_s} s")
    return {
        "counts": counts.astype(np.int64),
        "velocity": columns["vel"].astype(np.float64),
        "position": columns["pos"].astype(np.float64),
        "acceleration": columns["acc"].astype(np.float64),
        "force": columns["force"].astype(np.float64),
        "timestep": columns["timestep"],
        "target": np.array([graph["y"][0] for graph in graphs]),
        "lengths": np.array([len(graph["x"]) for graph in graphs]),
    }


def _read_mc_maze(path: Path) -> dict[str, np.ndarray]:
    with path.open(encoding="utf-8") as file:
        header = file.readline().strip().split(",")
        table = np.loadtxt(file, delimiter=",")
    units = [column for column, name in enumerate(header) if name.startswith("unit_")]

    def pair(name: str) -> np.ndarray:
        return table[:, [header.index(f"{name}_x"), header.index(f"{name}_y")]]

    return {
        "times": table[:, header.index("timestamp")],
        "spikes": table[:, units].astype(np.uint8),
        "unit_ids": np.array([header[column] for column in units]),
        "hand_velocity": pair("hand_vel"),
        "hand_position": pair("hand_pos"),
        "cursor_position": pair("cursor_pos"),
        "eye_position": pair("eye_pos"),
    }
