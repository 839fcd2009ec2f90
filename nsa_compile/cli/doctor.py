"""`python -m nsa_compile doctor`: what this machine offers, what is missing, and how to get it."""

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable
from typing import Literal

import torch

SUMMARY = "Say what this machine has for NSA, what is missing, and how to get it."

Status = Literal["ok", "absent", "broken"]
_MARKS = {"ok": "ok", "absent": "-", "broken": "!!"}
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        status: "ok"; "absent", which only costs a feature or speed; "broken", with which nothing works.
        detail: what was found.
        advice: what to do about it; "" where nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings.

    Returns:
        0 if NSA works here, 1 if something that it needs is broken.
    """
    findings = [finding for check in CHECKS for finding in _findings(check)]
    broken = [finding for finding in findings if finding.status == "broken"]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return 1 if broken else 0
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{_MARKS[finding.status]:2}  {finding.name:{width}}  {finding.detail}")
        if finding.advice:
            print(f"    {'':{width}}  -> {finding.advice}")
    print(f"\n{len(broken)} broken: {', '.join(finding.name for finding in broken)}" if broken else "\nNSA works here.")
    return 1 if broken else 0


def _findings(check: Callable[[], Finding]) -> list[Finding]:
    try:
        return [check()]
    except Exception as error:
        logger.debug("check failed", exc_info=True)
        return [Finding(check.__name__.replace("_", " "), "broken", f"{type(error).__name__}: {error}")]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def python() -> Finding:
    """The interpreter and the system."""
    return Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")


def torch_version() -> Finding:
    """The version of torch, and of CUDA it is built for."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    detail = f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}"
    if version < (2, 11):
        return Finding("torch", "broken", detail, "pip install 'torch>=2.11'")
    return Finding("torch", "ok", detail)


def device() -> Finding:
    """The GPU; without one, everything runs on the CPU."""
    if not torch.cuda.is_available():
        advice = ""
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            advice = "This machine seems to have a GPU, and this torch is built without CUDA: see pytorch.org."
        detail = f"CPU only, {os.cpu_count()} cores: the blockwise implementation serves"
        return Finding("device", "absent", detail, advice)
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    detail = f"{properties.name}, compute capability {capability}, {properties.total_memory / 2**30:.0f} GiB"
    if properties.major < 8:
        return Finding("device", "absent", detail, "The Triton kernels are made for compute capability 8.0 and later.")
    return Finding("device", "ok", detail)


def triton() -> Finding:
    """Triton, which the CUDA kernels are written in."""
    version = _version("triton")
    if version is not None:
        return Finding("triton", "ok", version)
    if torch.cuda.is_available():
        return Finding("triton", "broken", "not installed; CUDA tensors need it", "pip install triton")
    return Finding("triton", "absent", "not installed; only CUDA needs it")


def compiler() -> Finding:
    """The C++ compiler, which Inductor uses for the CPU and to launch kernels."""
    names = (os.environ.get("CXX"), "g++", "clang++", "cl")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        return Finding("C++ compiler", "broken", "none found; torch.compile needs one", "apt-get install g++")
    return Finding("C++ compiler", "ok", path)


def operators() -> Finding:
    """Runs the operator on the CPU, forward and backward."""
    from nsa_compile import NSAConfig, nsa_attention

    config = NSAConfig(block_length=8, block_stride=4, selection_block=16, num_selected=3, window=16)
    query, key, value = (torch.randn(1, heads, 96, 16, requires_grad=True) for heads in (4, 2, 2))
    output = nsa_attention(query, key, value, config=config)
    output.sum().backward()
    finite = all(tensor is not None and bool(tensor.isfinite().all()) for tensor in (output, query.grad, key.grad))
    if not finite:
        return Finding("operators", "broken", "torch.ops.nsa gives numbers that are not finite")
    return Finding("operators", "ok", "torch.ops.nsa runs on the CPU, forward and backward")


def backend() -> Finding:
    """Whether `torch.compile(backend="nsa")` finds the backend by its name."""
    names = {entry.name for entry in importlib.metadata.entry_points(group="torch_dynamo_backends")}
    if "nsa" in names:
        return Finding('backend="nsa"', "ok", "registered")
    return Finding(
        'backend="nsa"', "absent", "not registered: the package is not installed", "pip install -e . or use nsa_backend"
    )


def cache_key() -> Finding:
    """Whether compiled code can be cached: the sources must be on disk to be hashed."""
    from nsa_compile.cache import source_hash

    if not source_hash():
        return Finding("compile cache", "absent", "sources not found on disk; nothing is cached", "Install unzipped.")
    return Finding("compile cache", "ok", f"sources {source_hash()[:12]}")


def transformers() -> Finding:
    """transformers, for `explain --model`."""
    return _optional("transformers", "explain --model and the quickstart need it")


def gguf() -> Finding:
    """gguf, to read .gguf checkpoints."""
    return _optional("gguf", "reading .gguf checkpoints needs it")


def _optional(package: str, purpose: str) -> Finding:
    version = _version(package)
    if version is None:
        return Finding(package, "absent", f"not installed; {purpose}", "pip install 'nsa-compile[models]'")
    return Finding(package, "ok", version)


CHECKS: tuple[Callable[[], Finding], ...] = (
    python,
    torch_version,
    device,
    triton,
    compiler,
    operators,
    backend,
    cache_key,
    transformers,
    gguf,
)
