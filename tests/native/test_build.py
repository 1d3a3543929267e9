"""The build without a compiler: it installs, says so once, and computes by the references."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROBE = """
import sys, warnings
# leave the editable installation out of the way: the wheel's files are what is tested
sys.meta_path = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
sys.path.insert(0, sys.argv[1])
import commissure, commissure.native as native
assert commissure.__file__.startswith(sys.argv[1]), commissure.__file__
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert native.backend() == "python" and not caught
    assert native.kernels() is None and native.kernels() is None
print(native.backend(), len(caught), caught[0].message)
"""


def test_a_build_without_a_compiler_still_installs(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core", reason="the build backend is not installed (group dev)")
    hidden = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc", "CMAKE_ARGS": f"-DCMAKE_MAKE_PROGRAM={os.devnull}"}
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q"]
    built = subprocess.run(
        [*command, "-w", str(tmp_path), "-C", f"build-dir={tmp_path / 'build'}"],
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("commissure-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert not [n for n in names if "/_kernels" in n or n.endswith((".cpp", ".h"))]
    assert "commissure/py.typed" in names
    assert "commissure/report/page.html.jinja" in names
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "site")], capture_output=True, text=True, check=False
    )
    assert probe.returncode == 0, probe.stderr
    assert probe.stdout.startswith("python 1 commissure was built without its C++ kernels")
