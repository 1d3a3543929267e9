"""`commissure mesa`: fit, eval, bench, show.

Under torchrun the same `fit` trains with several processes:
torchrun --nproc-per-node=2 -m commissure.cli mesa fit --parallel ddp ...
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from commissure.core.errors import InputError
from commissure.core.files import check_target
from commissure.core.options import whole

__all__ = ["app"]

app = App(name="mesa", help="The mesa layer: train and measure sequence models.")

Json = Annotated[bool, Parameter(name="--json", negative="")]
Sizes = Annotated[tuple[str, ...], Parameter(name="--size", consume_multiple=True, negative="")]
Settings = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=True, negative="")]
Whole = Annotated[int, Parameter(converter=whole)]


@app.command
def fit(
    *,
    out: Path,
    task: str = "mqar",
    size: Sizes = (),
    mixer: str = "mesa",
    steps: Whole = 600,
    settings: Settings = (),
    seed: Whole = 0,
    checkpoint_every: Annotated[int | None, Parameter(converter=whole)] = None,
    parallel: Literal["single", "ddp", "fsdp"] = "single",
    device: str = "cpu",
    as_json: Json = False,
) -> int | None:
    """Train a sequence model on a task, write it to OUT (.safetensors), print its score on the test split.

    With several processes: torchrun --nproc-per-node=2 -m commissure.cli mesa fit --parallel ddp --out OUT

    Parameters
    ----------
    out
        File to write.
    task
        mqar, in_context_recall, noisy_recall, fuzzy_recall, memorization, compression, selective_copying, regbench,
        regression, lds or wikitext2 (text as bytes).
    size
        Sizes of the task, as n_pairs=16 length=64 vocab=128; default the published ones.  A wrong name lists all.
    mixer
        attention, deltanet, gated_deltanet, gated_linear, gru, mamba, mesa, mlstm, rg_lru, s4d or sliding_window;
        several with commas between take turns; or a whole model: mesanet-140m, mesanet-440m, mesanet-940m,
        hawk-mesanet-140m, ...
    steps
        Training steps.
    settings
        Other fields of ModelConfig (dim, layers, heads, head_dim, mlp, mlp_ratio, positions, alone) and of FitConfig
        (batch_size, lr, final_lr, warmup, weight_decay, clip, examples, validate_every, test_size), as lr=0.003.
    seed
        Draws the weights and the batches.
    checkpoint_every
        Write OUT.training every so many steps; a run that was killed goes on from it.  Without it, Ctrl-C loses all.
    parallel
        ddp or fsdp, under torchrun.
    device
        cpu or cuda.
    as_json
        Print one JSON object.
    """
    from commissure.mesa.fit import fit as train_on
    from commissure.train import Checkpoint, joined

    check_target(out, "out")
    _check_ending(out, ("", ".safetensors"))
    if parallel == "single" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("parallel", parallel, "'ddp' or 'fsdp' for a command started by torchrun")
    model, config = _configs(steps, settings)
    chosen, training = open_task(task, size), out.with_name(out.name + ".training")
    checkpoint = None if checkpoint_every is None else Checkpoint(training, _positive(checkpoint_every))
    start = time.process_time()
    mixers = [name.strip() for name in mixer.split(",")]
    try:
        with joined(parallel) as processes, _progress(processes.rank == 0) as report:
            result = train_on(
                chosen, mixers, model=model, config=config, seed=seed, device=_device(device),
                progress=report, checkpoint=checkpoint, processes=processes,
            )  # fmt: skip
            if processes.rank != 0:
                return None
            result.model.save(out)
            training.unlink(missing_ok=True)
    except KeyboardInterrupt:
        if checkpoint is not None:
            raise
        sys.stderr.write("commissure: interrupted; nothing was saved: --checkpoint-every N would keep the training\n")
        return 130
    _report(_summary(out, result, time.process_time() - start), as_json)
    return None


@app.command(name="eval")
def evaluate(
    model: Path,
    /,
    *,
    task: str | None = None,
    size: Sizes = (),
    sequences: Whole = 1024,
    seed: Whole = 0,
    as_json: Json = False,
) -> None:
    """Print accuracy or mean squared error on the test split, in all and by position.

    Parameters
    ----------
    model
        A file written by `mesa fit`.
    task
        Another task than the one it was trained on.
    size
        Sizes that differ from those it was trained with.
    sequences
        How many to measure.
    seed
        Draws them.
    as_json
        Print one JSON object.
    """
    from commissure.mesa.fit import evaluate as measure
    from commissure.mesa.model import TaskModel

    trained = TaskModel.load(model)
    chosen = trained.task
    if task is not None and task != chosen.name:
        chosen = open_task(task, size)
    elif size:
        chosen = open_task(chosen.name, size, **chosen.model_dump())
    for what in ("vocab", "input_dim", "output_dim", "reads"):
        own, other = getattr(trained.task, what), getattr(chosen, what)
        if own != other:
            raise InputError(
                "task", f"{chosen.name} with {what} = {other}", f"a task with {what} = {own}, as the model"
            )
    found = measure(trained, chosen, seed=seed, n_sequences=_positive(sequences, "sequences"))
    _report({"task": chosen.name, **chosen.model_dump()} | _measured(found), as_json)


@app.command
def bench(*, full: bool = False, repeats: Whole = 3, as_json: Json = False) -> None:
    """Time the mesa layer's solvers against conjugate gradients and attention; print ratios with their ranges.

    Parameters
    ----------
    full
        Every size; else the few that matter.
    repeats
        Turns of each contender.
    as_json
        Print the rows as JSON.
    """
    from dataclasses import asdict

    from commissure.mesa.bench import bench_tables, print_tables

    tables = bench_tables(quick=not full, repeats=_positive(repeats, "repeats"))
    if as_json:
        _print(json.dumps({name: [asdict(row) for row in rows] for name, rows in tables.items()}))
    else:
        print_tables(tables)


@app.command
def show(
    model: Path,
    /,
    *,
    out: Path | None = None,
    sequences: Whole = 4,
    seed: Whole = 0,
    as_json: Json = False,
) -> None:
    """Print what each mesa head does on test sequences: gates, Lambda, condition number, steps; draw it to OUT (.svg).

    Parameters
    ----------
    model
        A file written by `mesa fit` or `Stack.save`, or a folder written by `save_pretrained`.
    out
        Figure to write.
    sequences
        How many to look at.
    seed
        Draws them.
    as_json
        Print the rows as JSON.
    """
    from dataclasses import asdict

    from commissure.mesa import show as showing
    from commissure.mesa.model import TaskModel

    if out is not None:
        check_target(out, "out")
        _check_ending(out, (".svg",))
    if TaskModel.is_saved(model):
        trained = TaskModel.load(model)
        batch = trained.task.batch(seed, _positive(sequences, "sequences"), split="test")
        rows = showing.inspect(trained, batch.inputs, lengths=showing.scored_lengths(batch.mask))
    else:
        rows = showing.show(model, n_texts=_positive(sequences, "sequences"), seed=seed)
    if out is not None:
        _draw(rows, out)
    if as_json:
        _print(json.dumps([asdict(row) for row in rows]))
        return
    _print(f"{'layer':24} head   gamma    beta  lambda      cond  steps    dof")
    for row in rows:
        _print(
            f"{row.layer:24} {row.head:4} {row.gamma_mean:7.4f} {row.beta_mean:7.4f} {row.lambda_mean:7.3f} "
            f"{row.condition_number:9.3g} {row.cg_steps:6.1f} {row.effective_dof[-1]:6.1f}"
        )


def open_task(name: str, sizes: tuple[str, ...], **defaults: Any) -> Any:
    """The task of this name with `sizes` given as NAME=VALUE."""
    from commissure.mesa.tasks import task

    return task(name, **{**defaults, **_pairs("size", sizes)})


def _configs(steps: int, settings: tuple[str, ...]) -> tuple[Any, Any]:
    """The ModelConfig and the FitConfig of NAME=VALUE entries, each field where it belongs."""
    from commissure.mesa.fit import FitConfig
    from commissure.mesa.model import ModelConfig

    given = _pairs("set", settings)
    model = ModelConfig(**{name: value for name, value in given.items() if name in ModelConfig.model_fields})
    rest = {name: value for name, value in given.items() if name not in ModelConfig.model_fields}
    for name in rest.keys() - FitConfig.model_fields.keys():
        raise InputError("set", name, f"one of {', '.join([*ModelConfig.model_fields, *FitConfig.model_fields])}")
    return model, FitConfig(**{"steps": steps, **rest})


def _pairs(option: str, entries: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE entries, values as JSON where they are."""
    given = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals:
            raise InputError(option, entry, "NAME=VALUE, as n_pairs=16")
        try:
            given[key] = json.loads(value)
        except json.JSONDecodeError:
            given[key] = value
    return given


def _check_ending(out: Path, endings: tuple[str, ...]) -> None:
    """Refuse a name whose ending promises another format than is written."""
    if out.suffix not in endings:
        raise InputError("out", str(out), f"a name ending in {endings[-1]}", f"pass {out.with_suffix(endings[-1])}")


def _positive(value: int, name: str = "checkpoint_every") -> int:
    if value < 1:
        raise InputError(name, value, "an integer >= 1")
    return value


def _device(name: str) -> Any:
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError("device", name, "a device of this machine, as cpu", str(error).splitlines()[0]) from None


def _progress(is_first: bool) -> Any:
    """The progress bar in the first process, nothing in the others."""
    from contextlib import nullcontext

    from commissure.train.progress import progress_bar

    return progress_bar("fit") if is_first else nullcontext()


def _summary(out: Path, result: Any, cpu_s: float) -> dict[str, Any]:
    """What `fit` prints: the file, its size, the run, the final evaluation."""
    found = {"model": str(out), "parameters": sum(p.numel() for p in result.model.parameters())}
    found |= {"loss": result.losses[-1], "evaluations": [list(pair) for pair in result.evaluations]}
    return found | {"cpu_s": cpu_s} | _measured(result.final)


def _measured(evaluation: Any) -> dict[str, Any]:
    """An evaluation under the name of its metric."""
    rest = {name: value for name, value in evaluation.to_dict().items() if value is not None}
    return {rest.pop("metric"): rest.pop("value"), **rest}


def _draw(rows: list[Any], out: Path) -> None:
    from matplotlib.figure import Figure

    from commissure.core.files import replacing
    from commissure.mesa.show import draw

    figure = Figure(figsize=(7, 8.5), layout="constrained")
    draw(rows, figure)
    with replacing(out) as partial:
        figure.savefig(partial, format="svg")


def _report(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print(json.dumps(result))
        return
    for name, value in result.items():
        if name == "by_position":
            continue  # one number a position: for --json
        shown = ", ".join(f"{step}: {v:.4f}" for step, v in value) if isinstance(value, list) else value
        _print(f"{name:16} {shown:.4f}" if isinstance(shown, float) else f"{name:16} {shown}")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
