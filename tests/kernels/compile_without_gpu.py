"""Compiles what the launchers would launch on a GPU, for a chosen GPU, on a machine that has none.

The launch code runs as it is, on CPU tensors; each kernel call compiles to machine code instead of running.
"""

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

# Bytes of shared memory that one program may have.
SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448}


@dataclasses.dataclass
class CompiledKernel:
    """One compiled kernel: its name and what it uses.

    Attributes:
        name: of the function.
        shared: shared memory of a program, bytes.
        warpgroup_mma: it uses Hopper's matrix instructions.
        pipelined: loads of a loop run ahead of the computation.
        bulk_copies: tiles are copied to shared memory by Hopper's unit for it.
        assembly: PTX.
    """

    name: str
    shared: int
    warpgroup_mma: bool
    pipelined: bool
    bulk_copies: bool
    assembly: str

    def is_serialized(self) -> bool:
        """Whether ptxas makes Hopper's matrix products wait for each other, about which it warns only."""
        return re.search("C751[0-9]", self._assemble()) is not None

    def spills(self) -> bool:
        """Whether ptxas, for Hopper, keeps registers in memory."""
        return re.search("[1-9][0-9]* bytes spill", self._assemble()) is not None

    def _assemble(self) -> str:
        ptxas = get_ptxas(90).path
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(self.assembly)
            command = [ptxas, "-v", "--gpu-name=sm_90a", str(source), "-o", str(Path(folder) / "kernel.cubin")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


class _Driver:
    """What Triton's compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Triton keeps one target for each device number as long as the process lives.
        return self._capability

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[list[CompiledKernel]]:
    """Within the context every Triton launch compiles for `sm_<capability>`; yields what was compiled."""
    compiled: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assembly = kernel.asm["ptx"]
        has = [word in assembly for word in ("wgmma", "cp.async", "cp.async.bulk.tensor")]
        compiled.append(CompiledKernel(self.__name__, kernel.metadata.shared, *has, assembly))

    driver = triton.runtime.driver
    with contextlib.ExitStack() as stack:
        fake = _Driver(capability)
        for name in ("_active", "_default"):
            stack.enter_context(mock.patch.object(driver, name, fake, create=True))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_instead))
        yield compiled
