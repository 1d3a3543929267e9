"""What a result was measured with: versions, machine, state of the source."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import commissure

__all__ = ["cores", "git_state", "machine", "source_digest", "versions"]

_PACKAGES = ("torch", "numpy", "scipy", "safetensors", "pydantic", "cyclopts", "matplotlib")
_ROOT = Path(commissure.__file__).parent


def versions() -> dict[str, str]:
    """Versions of Python, commissure and the packages it computes with.

    >>> versions()["commissure"] == commissure.__version__
    True
    """
    found = {"python": platform.python_version(), "commissure": commissure.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def machine() -> dict[str, str]:
    """Processor, usable cores, memory, system."""
    return {
        "processor": _processor(),
        "cores": str(cores()),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError, OSError):
        return "unknown"


def git_state() -> dict[str, str | bool]:
    """Commit of the source and whether it was altered; empty when the package does not lie in its own repository."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:  # installed elsewhere, not tracked here
        return {}
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".")
    return {} if commit is None else {"commit": commit, "dirty": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def source_digest() -> str:
    """SHA-256 of every file of the installed package (kernels included): equal digests ran the same code."""
    digest = hashlib.sha256()
    for path in sorted(_ROOT.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(_ROOT).as_posix()} {content}\n".encode())
    return digest.hexdigest()
