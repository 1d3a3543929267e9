"""The error tree: what each error is, what its message says, and that both survive the way between processes."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from commissure.core import errors
from commissure.core.errors import BackendMissing, CommissureError, DegenerateError, InputError
from commissure.core.rng import spawn


def test_tree() -> None:
    """Each error is both ours and the built-in kind that generic code catches."""
    builtin = {
        "InputError": ValueError,
        "ConvergenceError": RuntimeError,
        "DegenerateError": ArithmeticError,
        "NotFittedError": RuntimeError,
        "BudgetExceeded": RuntimeError,
        "BackendMissing": ImportError,
    }
    for name, kind in builtin.items():
        assert issubclass(getattr(errors, name), CommissureError)
        assert issubclass(getattr(errors, name), kind)
    assert issubclass(errors.CommissureWarning, UserWarning)
    assert errors.__all__ == sorted([*builtin, "CommissureError", "CommissureWarning"])


def test_input_error_message() -> None:
    error = InputError("chunk_s", -0.05, "a number > 0 (seconds)", "pass for example chunk_s=0.05")
    assert str(error) == "chunk_s = -0.05: expected a number > 0 (seconds); pass for example chunk_s=0.05"
    assert str(InputError("x", (3, 2), "shape (n, 4)")) == "x = (3, 2): expected shape (n, 4)"


def test_long_values_are_cut() -> None:
    text = str(InputError("units", list(range(1000)), "known units"))
    assert len(text) < 250
    assert "...: expected known units" in text


@pytest.mark.parametrize(
    "error",
    [
        InputError("x[3]", float("inf"), "a finite number", "drop it"),
        BackendMissing("optuna", "optuna", "the sampler"),
        DegenerateError("no samples"),
    ],
)
def test_pickle_keeps_type_message_and_fields(error: CommissureError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__


def test_message_survives_a_worker_process() -> None:
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        pytest.raises(InputError, match=r"^seed = -1: expected an integer >= 0$"),
    ):
        pool.submit(spawn, -1).result()
