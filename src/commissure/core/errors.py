"""Errors and warnings: one tree, and messages that name the argument, its value, the allowed range and the fix."""

from __future__ import annotations

__all__ = [
    "BackendMissing",
    "BudgetExceeded",
    "CommissureError",
    "CommissureWarning",
    "ConvergenceError",
    "DegenerateError",
    "InputError",
    "NotFittedError",
]


class CommissureError(Exception):
    """Root of every error this library raises on purpose."""


class InputError(CommissureError, ValueError):
    """An argument outside its allowed range.

    Parameters: the argument's name, its value (or shape, or index), the allowed range, and what to do about it.

    >>> raise InputError("chunk_s", -0.05, "a number > 0 (seconds)", "pass for example chunk_s=0.05")
    Traceback (most recent call last):
    commissure.core.errors.InputError: chunk_s = -0.05: expected a number > 0 (seconds); pass for example chunk_s=0.05
    """

    def __init__(self, argument: str, value: object, allowed: str, fix: str = "") -> None:
        super().__init__(argument, value, allowed, fix)
        self.argument, self.value, self.allowed, self.fix = argument, value, allowed, fix

    def __str__(self) -> str:
        shown = repr(self.value)
        shown = shown if len(shown) <= 200 else f"{shown[:197]}..."
        return f"{self.argument} = {shown}: expected {self.allowed}" + (f"; {self.fix}" if self.fix else "")


class ConvergenceError(CommissureError, RuntimeError):
    """An iteration stopped before reaching its tolerance."""


class DegenerateError(CommissureError, ArithmeticError):
    """The quantity asked for is not defined by these data (zero variance, singular system, no samples)."""


class NotFittedError(CommissureError, RuntimeError):
    """A model was asked for results before it was fitted."""


class BudgetExceeded(CommissureError, RuntimeError):
    """The budget ended before any valid answer existed."""


class BackendMissing(CommissureError, ImportError):
    """An optional package is not installed.

    >>> raise BackendMissing("optuna", "optuna", "the sampler")
    Traceback (most recent call last):
    commissure.core.errors.BackendMissing: the sampler needs 'optuna'; install it with: pip install 'commissure[optuna]'
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(package, extra, purpose)
        self.package, self.extra, self.purpose = package, extra, purpose

    def __str__(self) -> str:
        return f"{self.purpose} needs {self.package!r}; install it with: pip install 'commissure[{self.extra}]'"


class CommissureWarning(UserWarning):
    """Root of every warning this library gives."""
