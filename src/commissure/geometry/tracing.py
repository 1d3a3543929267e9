"""All layers of a model in its own forward passes: hooks that add up covariances and keep no activation.

    with trace(model, sites=["layers.*", "lm_head:input"], pooling=("last", "all")) as traced:
        for batch in batches:
            model(**batch)
    for row in traced.report():
        print(row.site, row.pooling, row.frame, row.rankme)

| part      | what it is                                                                                        |
|-----------|---------------------------------------------------------------------------------------------------|
| site      | a module's name or pattern; its output (of several, the first), or with ":input" what it is given   |
| "last"    | the last token of every sequence that is not padding, on whichever side that is                     |
| "first"   | the first one                                                                                       |
| "mean"    | the mean over a sequence's tokens                                                                   |
| "all"     | every token, each a sample                                                                          |
| frame     | rows as they are, or scaled to length 1: whether a change is one of directions or of a few norms     |
| `skip`    | leading tokens of every sequence that "mean" and "all" leave out: attention sinks                   |

"lm_head:input" is what the head sees, after the final norm; that norm's ":input" is before it: say which, for ranks
differ.  Outputs have shape (batch, time, dim), or (batch, dim), where every pooling is the row itself.  The padding
mask is the keyword `attention_mask` of the model's own call or, in calls without one, what `traced.mask` was set to.

Overhead: 2 dim^2 operations a sample and site.  arXiv 2509.23024, section 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from commissure.core.errors import BackendMissing, CommissureWarning, DegenerateError, InputError
from commissure.geometry.accumulator import CovarianceAccumulator
from commissure.geometry.effective_rank import participation_ratio, rankme, stable_rank, top_share
from commissure.geometry.estimation import Estimate
from commissure.geometry.power_law import FitRange, alpha_req
from commissure.geometry.spectra import Spectrum

__all__ = [
    "POOLINGS",
    "MissingMaskWarning",
    "Pooling",
    "Trace",
    "TraceRow",
    "check_settings",
    "pool",
    "trace",
    "trace_row",
]

Pooling = Literal["last", "first", "mean", "all"]
POOLINGS: tuple[Pooling, ...] = ("last", "first", "mean", "all")
TraceFrame = Literal["raw", "unit"]
_TOP = 10  # late falls of the rank lie in the 10 to 30 largest directions


class MissingMaskWarning(CommissureWarning):
    """Padded sequences without a mask were traced."""


@dataclass(frozen=True)
class TraceRow:
    """The geometry of one site, pooling and frame; centered, eigenvalue weights; nan where all samples are equal.

    `rankme_stderr`: jackknife over folds (nan with one).  `rankme_corrected`: for few samples; None with one fold or
    fewer samples a half than components.  `rankme_without_top`: the 10 largest eigenvalues left out, None below 20
    components: a fall of `rankme` that this one does not show is one of a few directions.  `alpha` on ranks
    `alpha_window`, None where the spectrum is shorter, or too much of it noise for an automatic window; then that is
    None too.
    """

    site: str
    pooling: Pooling
    frame: TraceFrame
    n_samples: int
    dim: int
    rankme: float
    rankme_stderr: float
    rankme_corrected: float | None
    rankme_without_top: float | None
    participation_ratio: float
    stable_rank: float
    top_share: float
    alpha: float | None
    alpha_window: tuple[int, int] | None


def trace(
    model: nn.Module,
    *,
    sites: Sequence[str],
    pooling: Sequence[Pooling] = ("last",),
    frames: Sequence[TraceFrame] = ("raw", "unit"),
    n_folds: int = 2,
    skip: int = 0,
) -> Trace:
    """A context manager that traces `model`'s forward passes; a site that is no module's name is an InputError.

    Sixteen folds give errors, two a correction for few samples.  Memory: n_folds * dim^2 numbers a site, pooling and
    frame.  Outputs of the model are left bit for bit as they are and hooks are always removed.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    >>> with torch.no_grad(), trace(model, sites=["*"], frames=["raw"]) as traced:
    ...     _ = model(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))
    >>> [(row.site, row.n_samples, row.dim) for row in traced.report(fit_range=(1, 2))]
    [('0', 50, 2), ('1', 50, 2)]
    """
    check_settings(sites=sites, pooling=pooling, frames=frames, n_folds=n_folds, skip=skip)
    return Trace(model, resolve(model, sites), tuple(pooling), tuple(frames), n_folds, skip)


def check_settings(
    *, sites: Sequence[str], pooling: Sequence[Pooling], frames: Sequence[TraceFrame], n_folds: int, skip: int
) -> None:
    """`InputError` for settings that no model could be traced with; whether a model has the sites, `trace` tells."""
    if isinstance(sites, str) or not sites or not all(isinstance(site, str) for site in sites):
        raise InputError("sites", sites, "a list of names or patterns of modules")
    for name, given, known in (("pooling", pooling, POOLINGS), ("frames", frames, ("raw", "unit"))):
        if isinstance(given, str) or not given or any(one not in known for one in given):
            raise InputError(name, given, f"a list of {', '.join(known)}")
    for name, value, least in (("n_folds", n_folds, 1), ("skip", skip, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(name, value, f"an integer >= {least}")


class Trace:
    """Covariances by (site, pooling, frame) in `folds`; made by `trace`."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[str],
        pooling: tuple[Pooling, ...],
        frames: tuple[TraceFrame, ...],
        n_folds: int,
        skip: int,
    ) -> None:
        self.model, self.sites, self.pooling, self.frames = model, tuple(sites), pooling, frames
        self.n_folds, self.skip = n_folds, skip
        self.mask: Bool[Tensor, "batch time"] | None = None
        self.accumulators: dict[tuple[str, Pooling, TraceFrame], CovarianceAccumulator] = {}
        self._seen: Bool[Tensor, "batch time"] | None = None  # the mask of the call that runs
        self._is_warned = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Trace:
        if self._hooks:
            raise InputError("trace", "entered twice", "one `with` at a time")
        modules = dict(self.model.named_modules())
        try:
            self._hooks.append(self.model.register_forward_pre_hook(self._see_mask, with_kwargs=True))
            for site in self.sites:
                name, _, side = site.partition(":")
                self._hooks.append(self._hook(modules[name], site, is_input=side == "input"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._seen = None

    def report(self, *, fit_range: FitRange = (11, 100)) -> tuple[TraceRow, ...]:
        """One row a site, pooling and frame, in this order; nothing traced yet: `DegenerateError`."""
        if not self.accumulators:
            raise DegenerateError("no forward pass was traced: call the model inside the `with` block")
        return tuple(trace_row(key, acc, fit_range=fit_range) for key, acc in self.accumulators.items())

    def to_frame(self, *, fit_range: FitRange = (11, 100)) -> Any:
        """`report` as a pandas table."""
        try:
            import pandas as pd
        except ImportError as error:
            raise BackendMissing("pandas", "frames", "to_frame") from error
        return pd.DataFrame([asdict(row) for row in self.report(fit_range=fit_range)])

    def _hook(self, module: nn.Module, site: str, *, is_input: bool) -> torch.utils.hooks.RemovableHandle:
        if is_input:
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: self._add(site, args[0] if args else next(iter(kwargs.values()))),
                with_kwargs=True,
            )
        return module.register_forward_hook(lambda _, __, output: self._add(site, output))

    def _see_mask(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("attention_mask")
        self._seen = given.detach().bool() if isinstance(given, Tensor) and given.ndim == 2 else None
        ids, padding = kwargs.get("input_ids"), getattr(getattr(module, "config", None), "pad_token_id", None)
        if self._seen is not None or self.mask is not None or self._is_warned or padding is None:
            return
        if isinstance(ids, Tensor) and bool(ids.eq(padding).any()):
            self._is_warned = True
            warnings.warn(
                f"input_ids hold the padding token {padding} and no attention_mask came with them: padding counts as"
                " tokens; pass attention_mask, or set traced.mask",
                MissingMaskWarning,
                stacklevel=2,
            )

    @torch.no_grad()
    def _add(self, site: str, output: Any) -> None:
        states = _first_tensor(site, output)
        mask = self.mask if self._seen is None else self._seen
        for pooling in self.pooling:
            rows = pool(states, pooling, mask=mask, skip=self.skip)
            for frame in self.frames:
                key = site, pooling, frame
                if key not in self.accumulators:
                    self.accumulators[key] = CovarianceAccumulator(rows.shape[1], n_folds=self.n_folds, frame=frame)
                self.accumulators[key].update(rows)


def pool(
    states: Float[Tensor, "batch time dim"] | Float[Tensor, "batch dim"],
    pooling: Pooling,
    *,
    mask: Bool[Tensor, "batch time"] | None = None,
    skip: int = 0,
) -> Float[Tensor, "samples dim"]:
    """Rows from a batch of sequences; sequences without a token that counts are left out.

    >>> states = torch.arange(6.0).view(1, 3, 2)
    >>> pool(states, "last", mask=torch.tensor([[True, True, False]])).tolist()
    [[2.0, 3.0]]
    """
    if states.ndim == 2:
        return states
    if states.ndim != 3:
        raise InputError("states", tuple(states.shape), "shape (batch, time, dim) or (batch, dim)")
    keep = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask
    if keep.shape != states.shape[:2] or keep.dtype != torch.bool:
        raise InputError("mask", (tuple(keep.shape), str(keep.dtype)), f"bool, shape {tuple(states.shape[:2])}")
    if pooling in ("last", "first"):
        rows = keep.any(1)
        places = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        at = places.masked_fill(~keep, -1).amax(1) if pooling == "last" else keep.int().argmax(1)
        return states[rows, at[rows]]
    keep = keep & (keep.cumsum(1) > skip)
    is_whole = bool(keep.all())  # then nothing is copied
    if pooling == "all":
        return states.flatten(0, 1) if is_whole else states[keep]
    wide = states if states.dtype == torch.float64 else states.float()
    sums = (wide if is_whole else wide.masked_fill(~keep[..., None], 0)).sum(1)
    rows = keep.any(1)
    return sums[rows] / keep.sum(1)[rows, None]


def resolve(model: nn.Module, sites: Sequence[str]) -> list[str]:
    """Names of modules that the patterns match, with their ":input", in the order of the model.

    >>> resolve(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), ["*:input"])
    ['0:input', '1:input']
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for i, site in enumerate(sites):
        pattern, colon, side = site.partition(":")
        if colon and side != "input":
            raise InputError(f"sites[{i}]", site, "a name, or a name and ':input'")
        matches = [name for name in names if fnmatchcase(name, pattern) and name.count(".") == pattern.count(".")]
        if not matches:
            near = get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise InputError(f"sites[{i}]", site, "the name of a module", f"close: {', '.join(near or names[:3])}")
        found.update({name + colon + side: None for name in matches})
    return list(found)


def _first_tensor(site: str, output: Any) -> Tensor:
    """Of a module's output or input: the tensor, or the first of a tuple or a Hugging Face output."""
    while isinstance(output, tuple | list | dict) and output:
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    if not isinstance(output, Tensor) or output.ndim not in (2, 3) or not output.is_floating_point():
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"output of {site}", found, "floating-point, shape (batch, time, dim) or (batch, dim)")
    return output


def trace_row(key: tuple[str, Pooling, TraceFrame], acc: CovarianceAccumulator, *, fit_range: FitRange) -> TraceRow:
    """The row of one site, pooling and frame; nan where all samples are equal, for a report goes on."""
    found, whole = acc.spectrum(), (acc.n_samples, len(acc.folds[0].mean))
    if not found.values[0] > 0:
        window = None if fit_range == "auto" else fit_range
        return TraceRow(*key, *whole, np.nan, np.nan, None, None, np.nan, np.nan, np.nan, None, window)
    correctable = len(acc.folds) > 1 and acc.n_samples // 2 >= found.dim
    try:
        estimate = acc.estimate(rankme, correction="half" if correctable else None)
    except DegenerateError:  # all of a fold's samples are equal
        estimate = Estimate(rankme(found), np.nan, None)
    return TraceRow(
        *key,
        *whole,
        estimate.value,
        estimate.stderr,
        estimate.corrected,
        _without_top(found),
        participation_ratio(found),
        stable_rank(found),
        top_share(found),
        *_alpha(found, fit_range),
    )


def _without_top(found: Spectrum) -> float | None:
    enough = found.dim >= 2 * _TOP and found.values[_TOP : _TOP + 1].sum() > 0
    return rankme(found, drop_top=_TOP) if enough else None


def _alpha(found: Spectrum, fit_range: FitRange) -> tuple[float | None, tuple[int, int] | None]:
    """Alpha and its window; alpha is None where there is none: a report goes on over sites of all widths."""
    if fit_range == "auto":
        try:
            fit = alpha_req(found, fit_range=fit_range)
        except DegenerateError:
            return None, None
        return fit.alpha, fit.window
    n_positive = int((found.values > np.finfo(np.float64).eps * found.values[0]).sum())
    return alpha_req(found, fit_range=fit_range).alpha if fit_range[1] <= n_positive else None, fit_range
