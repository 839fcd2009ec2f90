"""Lets Inductor generate CUDA code on a machine without a GPU, and stops before anything would run.

For tests only: what torch and Triton ask a GPU is patched to describe an H100.  Tensors are fake ones on "cuda".
Written against torch 2.13; where a patched name is missing in another torch, `generate_code` fails loudly.
"""

import contextlib
import copy
import dataclasses
import importlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx, config
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from nsa_compile import compat
from nsa_compile.lowering import register_templates

_PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


class _Driver:
    """What Triton's compiler asks of a driver."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True


_TORCH = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.is_initialized": lambda: True,
    "torch.cuda._lazy_init": lambda: None,
    "torch.cuda.random._lazy_init": lambda: None,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.set_device": lambda *_: None,
    "torch.cuda._exchange_device": lambda *_: 0,
    "torch.cuda._maybe_exchange_device": lambda *_: 0,
    "torch.cuda.synchronize": lambda *_: None,
    "torch.cuda.get_device_properties": lambda *_: _PROPERTIES,
    "torch.cuda.get_device_capability": lambda *_: (9, 0),
    "torch.cuda.get_device_name": lambda *_: "NVIDIA H100",
    "torch.cuda.is_bf16_supported": lambda *_, **__: True,
    "torch.cuda.get_rng_state": lambda *_: torch.zeros(1),
    "torch.cuda.set_rng_state": lambda *_: None,
    "torch.version.cuda": "13.0",
    "torch._inductor.scheduler.has_triton": lambda: True,
    # Patterns are traced on real tensors of the device when Inductor starts.
    "torch._inductor.fx_passes.joint_graph.lazy_init": lambda *_, **__: None,
    "torch._inductor.fx_passes.post_grad.lazy_init": lambda *_, **__: None,
    # Copies one fake tensor into another, which asks the device's library.
    "torch._inductor.fx_passes.post_grad.reinplace_inplaceable_ops": lambda *_, **__: None,
}
_INTERFACE = {
    "is_available": lambda: True,
    "get_compute_capability": lambda *_: 90,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "is_triton_capable": lambda *_: True,
    "raise_if_triton_unavailable": lambda *_: None,
}


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Within the context, an H100 seems to be there for code generation."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties

    values = {"type": "cuda", "index": 0, "cc": 90, **vars(_PROPERTIES)}
    fields = getattr(DeviceProperties, "_fields", None) or DeviceProperties.__dataclass_fields__
    properties = DeviceProperties(**{name: value for name, value in values.items() if name in fields})
    driver = triton.runtime.driver
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=owner is driver))

        patch(driver, "_active", _Driver())
        patch(driver, "_default", _Driver())
        for path, value in _TORCH.items():
            module, _, name = path.rpartition(".")
            patch(importlib.import_module(module), name, value)
        for name, value in _INTERFACE.items():
            patch(CudaInterface, name, staticmethod(value))
        patch(CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: _PROPERTIES))
        patch(CudaInterface.Worker, "current_device", staticmethod(lambda: 0))
        patch(DeviceProperties, "create", classmethod(lambda *_: properties))
        yield


@dataclasses.dataclass
class CapturedGraph:
    """A graph of aten operators that Inductor was given on the CPU.

    Attributes:
        module: the graph.
        inputs: its inputs, fake or symbols.
        settings: arguments of Inductor's compilation.
        patches: of Inductor's configuration.
        calls: for each call, its arguments on the CPU, and what the graph computes from them eagerly.
    """

    module: fx.GraphModule
    inputs: list[Any]
    settings: dict[str, Any]
    patches: dict[str, Any]
    calls: list[tuple[list[Any], Sequence[Any]]] = dataclasses.field(default_factory=list)


def capture_graphs(run: Callable[[], Any]) -> list[CapturedGraph]:
    """Returns each graph that the NSA backend hands to Inductor in a run on the CPU, forward before backward.

    What a graph computes is computed eagerly, so that a backward pass in the run is compiled too.

    Args:
        run: calls a compiled function, with or without a backward pass.
    """
    graphs: list[CapturedGraph] = []

    def compile_on_cpu(graph_module: fx.GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any]) -> Any:
        def collect(inner: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
            kept = {name: settings[name] for name in ("is_backward", "is_inference") if name in settings}
            graph = CapturedGraph(copy.deepcopy(inner), list(inputs), kept, patches)
            graphs.append(graph)

            def compute(*arguments: Any) -> Any:
                outputs = inner(*arguments)
                graph.calls.append((list(arguments), outputs))
                return outputs

            return make_boxed_func(compute)

        return compile_fx.compile_fx(graph_module, list(example_inputs), inner_compile=collect, config_patches=patches)

    with mock.patch.object(compat, "compile_with_inductor", compile_on_cpu):
        run()
    return graphs


def generate_code(graph: CapturedGraph) -> str:
    """Returns what Inductor would generate for a graph on a GPU; the graph itself is moved there.

    AOTAutograd works on CPU tensors, for a GPU's device guards cannot be faked; only Inductor sees a GPU.
    """
    codes: list[str] = []
    generate = GraphLowering.codegen

    def stop_after_generation(self: Any) -> Any:
        code = generate(self)[0]
        codes.append(getattr(code, "value", code))
        raise _Generated

    for node in graph.module.graph.nodes:
        node.args, node.kwargs = _on_cuda(node.args), _on_cuda(node.kwargs)
        node.meta = {name: _on_cuda(value) for name, value in node.meta.items()}
    graph.module.recompile()
    settings = {**graph.patches, "force_disable_caches": True, "compile_threads": 1}
    stopping = mock.patch.object(GraphLowering, "codegen", stop_after_generation)
    with fake_cuda(), config.patch(settings), stopping, contextlib.suppress(_Generated):
        assert register_templates()
        compile_fx.compile_fx_inner(graph.module, _on_cuda(graph.inputs), **graph.settings)
    return codes[0]


class _Generated(BaseException):
    """Ends a compilation: there is code, and nothing to run it on.  No Exception, which Inductor would wrap."""


def _on_cuda(tree: Any) -> Any:
    """Moves fake tensors and devices anywhere in a tree."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cuda", 0)
        if not isinstance(value, FakeTensor):
            return value
        with value.fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    return pytree.tree_map(move, tree)
