"""The public surface: every `__all__` is sorted and importable, every organ can be imported by name."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import commissure

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(commissure.__path__, "commissure.")
    if not module.name.rpartition(".")[2].startswith("_")
)


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_importable(name: str) -> None:
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert list(names) == sorted(names, key=_order), f"{name}.__all__"
    assert len(set(names)) == len(names)
    for public in names:
        assert getattr(module, public) is not None


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name: str) -> None:
    assert (importlib.import_module(name).__doc__ or "").strip(), f"{name} has no docstring"


def test_top_level_is_locked() -> None:
    assert commissure.__all__ == [
        "__version__", "core", "datasets", "decode", "experiments", "geometry", "mesa", "metahmm", "native", "nn",
        "report", "reservoirs", "runs", "train",
    ]  # fmt: skip
    for name in commissure.__all__:
        assert getattr(commissure, name) is not None
    assert dir(commissure) == sorted(commissure.__all__)
    with pytest.raises(AttributeError, match="it has"):
        commissure.nothing  # noqa: B018


def test_runs_report_experiments_are_locked() -> None:
    from commissure import experiments, report, runs

    assert experiments.__all__ == ["CLAIMS", "Bound", "Claim", "Context", "Cost", "Outcome", "Row", "reproduce"]
    assert report.__all__ == ["Bound", "Entry", "Report", "Row", "number"]
    assert runs.__all__ == [
        "DeadlineExceeded", "IsolatedExecutor", "Migration", "Run", "RunStore", "WorkerDied", "append_only",
        "check_workers", "cores", "finished", "git_state", "home", "machine", "notify", "one_thread",
        "source_digest", "sweep_bar", "versions",
    ]  # fmt: skip


def _order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions: the order of the linter's rule on `__all__`."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)
