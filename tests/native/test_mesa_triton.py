"""The Triton kernels of the Mesa layer: through the interpreter, compiled for GPUs, on a GPU where there is one.

Triton decides at import whether it interprets, so that the cases run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from commissure.core.errors import BackendMissing, InputError
from commissure.native import mesa_triton
from commissure.native.mesa_triton import mesa_triton_attention, mesa_triton_available, mesa_triton_solve
from commissure.nn.mesa import solver_for

CASES = Path(__file__).with_name("mesa_triton_cases.py")
SOURCE = Path(mesa_triton.__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from commissure.native import mesa_triton_kernels as kernels

dim = int(sys.argv[3])
SIZES = {"H": 4, "D": dim, "K": dim, "N": dim, "BLOCK_T": 32, "BLOCK_K": 32, "BLOCK_N": 32, "BLOCK_D": dim,
         "INIT": "diag", "HAS_VALUES": True, "REVERSE": True, "PRECISION": sys.argv[2]}
NUMBERS = {"T": "i32", "n_chunks": "i32", "stride_k": "i32", "stride_n": "i32", "max_steps": "i32", "eps": "fp32",
           "steps": "*i32"}
for name in kernels.__all__:
    kernel = getattr(kernels, name)
    constants = {n: value for n, value in SIZES.items() if n in kernel.arg_names}
    types = {n: "constexpr" if n in constants else NUMBERS.get(n, "*fp32") for n in kernel.arg_names}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    made = compile(ASTSource(kernel, types, constants, {}), target=target, options={"num_warps": 4})
    assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024, (name, made.metadata.shared)
    print(name)
"""


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def run_cases(**variables: str) -> None:
    found = run("-m", "pytest", str(CASES), "-q", "-p", "no:cacheprovider", "-p", "no:xdist", **variables)
    assert found.returncode == 0, found.stdout + found.stderr
    assert " passed" in found.stdout


@needs_triton
def test_cases_through_the_interpreter() -> None:
    run_cases(TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cases_on_a_gpu() -> None:
    run_cases()


@needs_triton
@pytest.mark.parametrize(("architecture", "precision", "dim"), [(75, "ieee", 32), (90, "tf32x3", 64)])
def test_kernels_compile_within_a_small_gpu(tmp_path: Path, architecture: int, precision: str, dim: int) -> None:
    (tmp_path / "compile_all.py").write_text(COMPILE)
    script = str(tmp_path / "compile_all.py")
    found = run(script, str(architecture), precision, str(dim), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.split()) == 4


def test_importing_the_door_loads_no_triton() -> None:
    code = "import sys, commissure.native, commissure.native.mesa_triton as door; print('triton' in sys.modules)"
    assert run("-c", code).stdout.strip() == "False"


def arguments(dim: int = 4) -> dict[str, Any]:
    token = torch.zeros(1, 2, 3, dim)
    gate, state = torch.zeros(1, 2, 3), torch.zeros(1, 3, dim, dim)
    return {"q": token, "k": token, "g": gate, "beta": gate, "lamb": torch.ones(3, dim), "h_kk": state}


BAD = {
    "q": {"q": torch.zeros(2, 3, 4)},
    "k": {"k": torch.zeros(1, 2, 3, 5)},
    "g": {"g": torch.zeros(1, 2, 3, 1)},
    "beta.dtype": {"beta": torch.zeros(1, 2, 3, dtype=torch.float64)},
    "beta.device": {"beta": torch.zeros(1, 2, 3, device="meta")},
    "lamb": {"lamb": torch.ones(4)},
    "h_kk.dtype": {"h_kk": torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16)},
    "h_kk": {"h_kk": torch.zeros(1, 3, 4)},
    "eps": {"eps": -1.0},
    "max_steps": {"max_steps": -1},
    "init": {"init": "ones"},
    "chunk_size": {"chunk_size": 48},
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_input_names_the_argument(argument: str) -> None:
    with pytest.raises(InputError) as caught:
        mesa_triton_solve(**{**arguments(), **BAD[argument]})
    assert caught.value.argument == argument


def test_more_than_128_dimensions() -> None:
    with pytest.raises(InputError, match="more heads"):
        mesa_triton_solve(**arguments(129))


def test_values_are_checked() -> None:
    tensors = arguments()
    h_kk = tensors.pop("h_kk")
    with pytest.raises(InputError) as caught:
        mesa_triton_attention(**tensors, v=torch.zeros(1, 2, 3, 7), initial_state=(h_kk, torch.zeros(1, 3, 4, 6)))
    assert caught.value.argument == "h_kv"


@needs_triton
def test_a_cpu_tensor_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not mesa_triton_available("cpu")
    with pytest.raises(InputError, match="another solver"):
        mesa_triton_solve(**arguments())
    with pytest.raises(InputError, match=r"solver = 'triton': expected a GPU, not cpu; .*another solver"):
        solver_for("triton", torch.device("cpu"))


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesa_triton, "find_spec", lambda name: None)
    assert not mesa_triton_available("cuda")
    with pytest.raises(BackendMissing, match=r"commissure\[triton\]"):
        mesa_triton_solve(**arguments())
    with pytest.raises(BackendMissing, match=r"commissure\[triton\]"):
        solver_for("triton", torch.device("cuda"))
