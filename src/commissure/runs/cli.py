"""`commissure env`: what a result on this machine would be measured with."""

from __future__ import annotations

import json
import os
from typing import Annotated

from cyclopts import Parameter

__all__ = ["env"]


def env(*, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> int:
    """Versions, backend, device, threads, folders.

    Parameters
    ----------
    as_json
        Print one JSON object.
    """
    from rich.console import Console

    facts = _facts()
    if as_json:
        print(json.dumps(facts, indent=1))  # noqa: T201
        return 0
    console = Console()
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = ", ".join(f"{key} {text}" for key, text in value.items()) if isinstance(value, dict) else str(value)
        console.print(f"{name:<{width}}  {shown}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _facts() -> dict[str, object]:
    import torch

    from commissure.native import backend
    from commissure.runs.environment import git_state, machine, versions
    from commissure.runs.store import home

    git = git_state()
    data = os.environ.get("COMMISSURE_DATA")
    return {
        "versions": versions(),
        "commit": f"{git['commit']}{' (altered)' if git['dirty'] else ''}" if git else "not a checkout",
        "machine": machine(),
        "backend": backend(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "data": f"{data} (COMMISSURE_DATA)" if data else "downloaded on first use (COMMISSURE_DATA is not set)",
        "run store": str((home() / "runs.sqlite").resolve()),
    }
