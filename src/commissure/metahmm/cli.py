"""`commissure metahmm`: fit, eval, bench, show."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from commissure.core.errors import InputError
from commissure.core.files import check_target
from commissure.core.options import whole

__all__ = ["app"]

app = App(name="metahmm", help="In-context learning against its Bayes optimum, on families of hidden Markov models.")

Json = Annotated[bool, Parameter(name="--json", negative="")]
Settings = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=True, negative="")]
Whole = Annotated[int, Parameter(converter=whole)]
Groups = Annotated[
    tuple[Literal["train", "val", "ood"], ...], Parameter(name="--tasks", consume_multiple=True, negative="")
]

_MODEL, _TRAINING = "model.safetensors", "training.safetensors"
_SHOWN = {0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100, 150}  # and the last; --json has them all


@app.command
def fit(
    *,
    out: Path,
    preset: str = "e64",
    seed: Whole = 15,
    mixer: str = "attention",
    size: str = "cpu",
    steps: Annotated[int | None, Parameter(converter=whole)] = None,
    val: Annotated[int | None, Parameter(converter=whole)] = None,
    held_out_pairs: Whole = 0,
    variant: Literal["corrected", "reference"] = "corrected",
    recipe: str = "cpu",
    settings: Settings = (),
    checkpoint_every: Whole = 100,
    device: str = "cpu",
    as_json: Json = False,
) -> None:
    """Train a predictor on an environment's sequences, write it to the folder OUT, print its loss.

    A run that was killed goes on when the same command is given again.

    Parameters
    ----------
    out
        Folder to write; made where it does not exist.
    preset
        Environment: tiny, e64, small (the paper's), medium or default.
    seed
        Draws the environment, the split of its tasks, the weights and the sequences.
    mixer
        attention, deltanet, gated_deltanet, gated_linear, gru, mamba, mesa, mlstm, rg_lru, s4d or sliding_window.
    size
        cpu, or one of the paper's: 1.1m, 2m, 6.3m, 25m.
    steps
        Training steps; default the recipe's.
    val
        Tasks kept for validation; default 1,000, or an eighth of all where those are fewer.
    held_out_pairs
        Pairs of factor values that no training task has; the tasks that have one are `ood`.
    variant
        reference: the published code's environment with its defects.
    recipe
        cpu (4,000 steps of 32 x 32 tokens) or paper (50,000 of 256 x 200).
    settings
        Other fields of FitConfig (batch_size, length, lr, final_lr, warmup, weight_decay, clip), as lr=0.003.
    checkpoint_every
        Steps from one checkpoint to the next.
    device
        cpu or cuda.
    as_json
        Print one JSON object.
    """
    from commissure.metahmm.fit import FitConfig, implicit_stack
    from commissure.metahmm.fit import fit as train_on
    from commissure.metahmm.trained import Setting, Trained
    from commissure.train import Checkpoint
    from commissure.train.progress import progress_bar

    _check_folder(out)
    fields = {**FitConfig.from_preset(recipe).model_dump(), **_pairs(settings)}
    config = FitConfig(**fields if steps is None else {**fields, "steps": steps})
    setting = Setting.from_preset(
        preset, seed=seed, variant=variant, n_val=val, n_held_out_pairs=held_out_pairs, length=config.length
    )
    env = setting.environment()
    split = setting.split(env)
    model = implicit_stack(size, vocab=env.n_obs, mixer=mixer, seed=seed).to(_device(device))
    checkpoint = Checkpoint(out / _TRAINING, _positive(checkpoint_every, "checkpoint_every"))
    out.mkdir(exist_ok=True)
    start = time.process_time()
    with progress_bar("fit") as report:
        result = train_on(
            model, env, tasks=split.train, config=config, seed=seed, progress=report, checkpoint=checkpoint
        )
    Trained(model, setting, env).save(out / _MODEL)
    checkpoint.path.unlink()
    found: dict[str, Any] = {"model": str(out / _MODEL), "parameters": sum(p.numel() for p in model.parameters())}
    found |= {"tasks": {group: len(ids) for group, ids in zip(("train", "val", "ood"), split[:3], strict=True)}}
    found |= {"steps": len(result.losses), "loss": fmean(result.losses[-100:]), "cpu_s": time.process_time() - start}
    _summary(found, as_json=as_json)


def _summary(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        _print(json.dumps(found))
        return
    for name, value in found.items():
        counts = ", ".join(f"{n} {group}" for group, n in value.items()) if isinstance(value, dict) else value
        _print(f"{name:12} {counts:.4f}" if isinstance(counts, float) else f"{name:12} {counts}")


@app.command(name="eval")
def evaluate(
    model: Path,
    /,
    *,
    tasks: Groups = (),
    sequences: Whole = 300,
    length: Annotated[int | None, Parameter(converter=whole)] = None,
    prune: float = 0.0,
    seed: Whole = 0,
    as_json: Json = False,
) -> None:
    """Print a predictor's divergence from the Bayes optimum over all tasks, by position and by task entropy.

    Divergence is half the sum of both Kullback-Leibler divergences, in nats, with 95 % intervals over sequences.

    Parameters
    ----------
    model
        A folder written by `metahmm fit`, or the model in it.
    tasks
        Groups of tasks to draw sequences from: train, val, ood; default all there are.
    sequences
        Sequences of each group.
    length
        Tokens of each; default those it was trained on.
    prune
        The oracle leaves out matrices below this posterior mass; 1e-8 is several times as fast.
    seed
        Draws the sequences.
    as_json
        Print one JSON object with every position.
    """
    trained = _load(model)
    found = dict(_divergences(trained, tasks, sequences, length, prune=prune, seed=seed))
    if as_json:
        tables = {group: {"overall": d.overall, "by_position": d.by_position, "by_entropy": d.by_entropy}
                  for group, d in found.items()}  # fmt: skip
        _print(json.dumps(_plain(tables)))
        return
    for group, measured in found.items():
        _print(f"{group} tasks, {measured.overall.n_sequences} sequences; nats\n")
        _print_rows("", [measured.overall])
        last = measured.by_position[-1].position
        shown = [row for row in measured.by_position if row.position in _SHOWN or row.position == last]
        _print_rows("tokens seen", shown)
        _print_rows("task entropy", measured.by_entropy)


@app.command
def bench(
    *,
    preset: str = "small",
    seed: Whole = 15,
    length: Whole = 200,
    repeats: Whole = 3,
    as_json: Json = False,
) -> None:
    """Time the oracle and the sampler against their rivals; print ratios with their ranges.

    Parameters
    ----------
    preset
        Environment.
    seed
        Draws it and the sequences.
    length
        Tokens of a sequence.
    repeats
        Turns of each contender.
    as_json
        Print the rows as JSON.
    """
    from commissure.metahmm.bench import bench_oracle, bench_sampler

    _positive(length, "length")
    _positive(repeats, "repeats")
    oracle = bench_oracle(preset, seed=seed, length=length, repeats=repeats)
    sampler = bench_sampler(preset, seed=seed, length=length, repeats=repeats)
    if as_json:
        _print(json.dumps(_plain({"oracle": oracle, "sampler": sampler})))
        return
    first = oracle[0]
    _print(f"oracle: {first.n_tasks:,} tasks, {first.length} tokens, {first.dtype}, one thread")
    _print(f"\n{'contender':26} {'ms a sequence':>14}   {'times the oracle':24} {'error':>8}")
    for row in oracle:
        milliseconds = 1e3 * row.seconds.median
        _print(f"{row.contender:26} {milliseconds:14.3f}   {_spread(row.gain):24} {row.error:8.1e}")
    _print(f"{'its multiplications':26} {1e3 * first.floor:14.3f}   at the rate of a matrix product")
    _print(f"\n{'sampler':26} {'tokens a s':>14}   as many by the vectorized one")
    for drawn in sampler:
        _print(f"{drawn.contender:26} {drawn.tokens_a_second:14,.0f}   {_spread(drawn.ratio)}")


@app.command
def show(
    model: Path | None = None,
    /,
    *,
    preset: str | None = None,
    variant: Literal["corrected", "reference"] = "corrected",
    out: Path | None = None,
    sequences: Whole = 100,
    length: Annotated[int | None, Parameter(converter=whole)] = None,
    prune: float = 0.0,
    seed: Whole = 15,
    as_json: Json = False,
) -> None:
    """Print what an environment is made of and how fast its tasks become known; draw it to OUT (.svg).

    With MODEL its own environment, and its divergence from the optimum is drawn too.

    Parameters
    ----------
    model
        A folder written by `metahmm fit`, or the model in it.
    preset
        Environment, in place of a model: tiny, e64, small, medium or default.
    variant
        reference: the published code's environment with its defects.
    out
        Figure to write.
    sequences
        How many the entropy is a mean over; of each group of tasks, for the divergence.
    length
        Tokens of each; default 32, or those that the model was trained on.
    prune
        The oracle leaves out matrices below this posterior mass; 1e-8 is several times as fast.
    seed
        Draws the environment (a model has its own) and the sequences.
    as_json
        Print one JSON object.
    """
    from commissure.metahmm.environment import MetaHMM
    from commissure.metahmm.show import ambiguity, facts

    if (model is None) == (preset is None):
        raise InputError("model, preset", (model, preset), "one of the two", "pass --preset e64, or a folder of fit")
    if out is not None:
        check_target(out, "out")
        if out.suffix != ".svg":
            raise InputError("out", str(out), "a name ending in .svg", f"pass {out.with_suffix('.svg')}")
    trained = None if model is None else _load(model)
    env = trained.env if trained is not None else MetaHMM.from_preset(str(preset), seed=seed, variant=variant)
    length = length if length is not None else 32 if trained is None else trained.setting.length
    doubt = ambiguity(env, n_sequences=sequences, length=_positive(length, "length"), seed=seed, prune=prune)
    found = facts(env)
    if out is not None:
        _draw(out, doubt, trained, sequences, length, prune=prune, seed=seed)
    if as_json:
        _print(json.dumps(_plain({**found.to_dict(), "task_entropy": doubt})))
        return
    for name, value in found.to_dict().items():
        if name == "factors":
            continue
        _print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
    _print("\nfactors: " + ", ".join(f"{name} {size}" for name, size in found.factors))
    _print("\ntokens seen    task entropy (nats): mean [quartiles]")
    for row in doubt:
        if row.position in _SHOWN or row.position == length:
            _print(f"{row.position:11}    {row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]")


def _draw(
    out: Path, doubt: Sequence[Any], trained: Any, sequences: int, length: int, *, prune: float, seed: int
) -> None:
    """The figure of `show`."""
    from matplotlib.figure import Figure

    from commissure.core.files import replacing
    from commissure.metahmm.show import draw

    measured = {} if trained is None else dict(_divergences(trained, (), sequences, length, prune=prune, seed=seed))
    figure = Figure(figsize=(7, 8 if measured else 3), layout="constrained")
    draw(
        figure,
        doubt,
        by_position={group: found.by_position for group, found in measured.items()},
        by_entropy={group: found.by_entropy for group, found in measured.items()},
    )
    with replacing(out) as partial:
        figure.savefig(partial, format="svg")


def _load(path: Path) -> Any:
    from commissure.metahmm.trained import Trained

    return Trained.load(path / _MODEL if path.is_dir() else path)


def _divergences(
    trained: Any, groups: tuple[str, ...], n_sequences: int, length: int | None, *, prune: float, seed: int
) -> Iterator[tuple[str, Any]]:
    """Each group of tasks that was asked for (default: that is not empty) and what was measured on it."""
    from commissure.core.rng import generator
    from commissure.metahmm.divergence import evaluate_divergence
    from commissure.metahmm.oracle import BayesOracle

    split = trained.split._asdict()
    groups = groups or tuple(group for group in ("train", "val", "ood") if len(split[group]))
    for group in groups:
        if not len(split[group]):
            fix = "fit with --val or --held-out-pairs above 0"
            raise InputError("tasks", group, "a group with tasks in it", fix)
    oracle, length = BayesOracle(trained.env, prune=prune), trained.setting.length if length is None else length
    _positive(n_sequences, "sequences")
    with _counting(trained.model, n_sequences * len(groups)) as predictor:
        for group in groups:
            chosen = generator(seed, "eval", group).integers(len(split[group]), size=n_sequences)
            tokens = trained.env.sample(split[group][chosen], _positive(length, "length"), seed=seed).tokens
            yield group, evaluate_divergence(predictor, tokens, oracle=oracle, batch_size=16, seed=seed)


@contextmanager
def _counting(model: Any, total: int) -> Iterator[Any]:
    """The model with a bar of the sequences it has predicted, on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = "eval", BarColumn(), MofNCompleteColumn(), "sequences", TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("eval", total=total)

        class Counting:
            @staticmethod
            def log_probs(tokens: Any) -> Any:
                predicted = model.log_probs(tokens)
                progress.advance(task, len(tokens))
                return predicted

        yield Counting


def _pairs(entries: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE entries of FitConfig, values as JSON where they are."""
    from commissure.metahmm.fit import FitConfig

    given: dict[str, Any] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals:
            raise InputError("set", entry, "NAME=VALUE, as lr=0.003")
        if key not in FitConfig.model_fields:
            raise InputError("set", key, f"one of {', '.join(FitConfig.model_fields)}")
        try:
            given[key] = json.loads(value)
        except json.JSONDecodeError:
            given[key] = value
    return given


def _check_folder(out: Path) -> None:
    if not out.parent.is_dir() or (out.exists() and not out.is_dir()):
        raise InputError("out", str(out), "a folder, or a new one in an existing folder")


def _device(name: str) -> Any:
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError("device", name, "a device of this machine, as cpu", str(error).splitlines()[0]) from None


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise InputError(name, value, "an integer >= 1")
    return value


def _print_rows(label: str, rows: Sequence[Any]) -> None:
    """One table of divergence rows; the interval is left out where there is none."""
    _print(f"{label:14} {'entropy':>8}   {'divergence':24} {'forward':>8} {'backward':>8} {'NLL':>8} {'oracle':>8}")
    for row in rows:
        name = "all" if row.position is None else str(row.position)
        if row.entropy_low is not None:
            name = f"{row.entropy_low:g} to {row.entropy_high:g}"
        numbers = (row.forward.estimate, row.backward.estimate, row.nll.estimate, row.oracle_nll.estimate)
        cells = " ".join(f"{x:8.4f}" if math.isfinite(x) else f"{'-':>8}" for x in numbers)
        estimate, low, high = row.divergence
        interval = f"{estimate:.4f} [{low:.4f}, {high:.4f}]" if math.isfinite(low) else f"{estimate:.4f}"
        _print(f"{name:14} {row.task_entropy:8.3f}   {interval:24} {cells}")
    _print("")


def _spread(turns: Any) -> str:
    return f"{turns.median:.3g} [{turns.low:.3g}, {turns.high:.3g}]"


def _plain(value: Any) -> Any:
    """Data for JSON: rows as objects, numbers that JSON has no word for as null."""
    from dataclasses import asdict, is_dataclass

    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
