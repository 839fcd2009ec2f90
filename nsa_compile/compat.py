"""The private parts of torch that the backend and `explain` need, each with what happens where it is missing.

Written against torch 2.11 and 2.13.  Where a torch lacks one of them, the feature that needs it is left out with a
warning, and what is compiled stays correct.
"""

import contextlib
import importlib
import inspect
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import fx

from nsa_compile.errors import NSAError
from nsa_compile.rowwise import rowwise_template_class

logger = logging.getLogger(__name__)


def _private(module: str, name: str, consequence: str) -> Any:
    """Returns a private object of torch; None, with a warning that names the consequence, where there is none."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        logger.warning("torch %s has no %s.%s: %s", torch.__version__, module, name, consequence)
        return None


def inductor_patches(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Works `mode=` and `options=` of `torch.compile` out into patches of Inductor's configuration.

    Options override the mode where both set the same thing.

    Raises:
        RuntimeError: Inductor knows no such mode or option; the message lists those it knows.
    """
    wrapper = _private("torch", "_TorchCompileInductorWrapper", "options of Inductor are not checked.")
    if wrapper is None:
        return {**torch._inductor.list_mode_options(mode or "default"), **(options or {})}
    inductor = wrapper(mode, None, None)
    inductor.apply_options(dict(options or {}))
    return dict(inductor.config)


def compile_with_inductor(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compiles a Dynamo graph as `backend="inductor"` does, under patches of Inductor's configuration."""
    from torch._inductor.compile_fx import compile_fx

    compiled = compile_fx(graph_module, example_inputs, config_patches=dict(patches))
    return cast("Callable[..., Any]", compiled)


def reset_inductor() -> None:
    """Forgets CUDA graphs, as `torch._dynamo.reset()` asks of a backend."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


def joint_passes(patches: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the user's own `joint_custom_pre_pass`: from the options, else from Inductor's global configuration."""
    from torch._inductor import config

    name = "joint_custom_pre_pass"
    passes = patches[name] if name in patches else getattr(config, name, None)
    if passes is None:
        return ()
    return tuple(passes) if isinstance(passes, list | tuple) else (passes,)


def graph_pass_class() -> type:
    """Returns the base class of passes whose `uuid()` enters Inductor's cache keys."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def is_traced() -> bool:
    """Tells whether `TORCH_TRACE` asks for artifacts."""
    return bool(logging.getLogger("torch.__trace").handlers)


def trace_artifact(name: str, text: Callable[[], str], encoding: str = "string") -> None:
    """Writes an artifact into the trace that `TORCH_TRACE` asks for; `text` is called only if there is one."""
    trace = getattr(torch._logging, "trace_structured", None)
    if trace is not None:
        trace("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=text)


@contextlib.contextmanager
def users_errors() -> Iterator[None]:
    """Lets this package's errors pass through Dynamo to the caller of the model, when raised inside a backend.

    Dynamo wraps what a backend raises into `BackendCompilerFailed`, except for errors of one class of its own.
    Those that leave here are of both classes, so `except UnknownOptionError` works around a compiled call.
    """
    from torch._dynamo import exc

    shorten = getattr(exc, "ShortenTraceback", None)
    try:
        yield
    except NSAError as error:
        if shorten is None or isinstance(error, shorten):
            raise
        kind = type(error)
        passed_on: Any = type(kind.__name__, (shorten, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
        plain = passed_on(str(error), first_useful_frame=inspect.currentframe())
        raise plain.with_traceback(error.__traceback__) from error


def compile_isolated(
    function: FunctionType, backend: Callable[..., Any], *, fullgraph: bool, dynamic: bool | None
) -> Callable[..., Any]:
    """Compiles so that recompilations are counted apart from the user's, where torch can do that.

    The function gets a code object of its own: Dynamo's caches, and their limits, hang on those.
    """
    function = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    isolation: dict[str, Any] = (
        {"isolate_recompiles": True} if "isolate_recompiles" in _parameters(torch.compile) else {}
    )
    return torch.compile(function, backend=backend, fullgraph=fullgraph, dynamic=dynamic, **isolation)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def original_callable(model: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what `torch.compile` was given, for a compiled model or function; anything else as it is."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", None)
        if inner is None:
            return model
        model = inner


def is_compiled(module: torch.nn.Module) -> bool:
    """Tells whether a module was compiled in place (`module.compile()`) or is what `torch.compile(module)` returned."""
    return getattr(module, "_compiled_call_impl", None) is not None or original_callable(module) is not module


def fake_tensors() -> contextlib.AbstractContextManager[Any]:
    """Returns a mode in which tensors have shapes and no storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def break_reason(graph_module: fx.GraphModule) -> str | None:
    """Returns why Dynamo ended a graph early; None where the graph ends with its function."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return None
    what = str(reason.reason).strip().splitlines()[0]
    stack = getattr(reason, "user_stack", None)
    return f"{what} at {stack[-1].filename}:{stack[-1].lineno}" if stack else what


def no_recompile_limit() -> contextlib.AbstractContextManager[Any]:
    """Lets Dynamo capture a function anew inside as often as its guards fail, where it would give up and run it."""
    from torch._dynamo import config

    names = ("recompile_limit", "accumulated_recompile_limit")
    return config.patch({name: 1 << 30 for name in names if hasattr(config, name)})


@contextlib.contextmanager
def undisturbed_dynamo() -> Iterator[None]:
    """Lets Dynamo trace inside, and leaves its caches outside as they were.

    Inside, sizes are seen for the first time (nothing is dynamic because of an earlier call) and no recompilation
    limit holds.  Afterwards, code that was compiled only inside is forgotten.
    """
    compiled: dict[int, CodeType] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_recompile_limit())
        stack.enter_context(_fresh_dynamic_sizes())
        consequence = "explain leaves entries in Dynamo's caches."
        entries = _private("torch._C._dynamo.eval_frame", "_debug_get_cache_entry_list", consequence)
        hooks = _private("torch._dynamo.convert_frame", "register_bytecode_hook", consequence)
        reset = _private("torch._C._dynamo.eval_frame", "reset_code", consequence)
        if entries and hooks and reset:

            def remember(code: CodeType, _: CodeType) -> None:
                # The hook runs before the new entry is stored: entries that are there are the user's.
                if id(code) not in compiled and not entries(code):
                    compiled[id(code)] = code

            stack.callback(lambda: [reset(code) for code in compiled.values()])
            stack.callback(hooks(remember).remove)
        yield


@contextlib.contextmanager
def _fresh_dynamic_sizes() -> Iterator[None]:
    """Puts the record of sizes, by which Dynamo makes changing ones dynamic, aside."""
    pgo: Any = sys.modules.get("torch._dynamo.pgo")
    state = _private("torch._dynamo.pgo", "CodeState", "explain may see sizes as dynamic, or make them so.")
    if pgo is None or state is None or not hasattr(pgo, "_CODE_STATE"):
        yield
        return
    saved = pgo._CODE_STATE
    pgo._CODE_STATE = defaultdict(state)
    try:
        yield
    finally:
        pgo._CODE_STATE = saved


class TemplateTools:
    """What lowering an operator to a Triton template takes of Inductor; `template_tools` makes one.

    Tensors are nodes of Inductor's graph here, and sizes numbers or symbols.
    """

    def __init__(self) -> None:
        from torch._inductor import config, ir, lowering, select_algorithm
        from torch._inductor.codegen.simd import SIMDScheduling
        from torch._inductor.virtualized import V

        # Since torch 2.13 a template's kernel gets symbolic sizes in 64 bits where offsets need them.
        self._has_wide_sizes = "index_dtype_override" in _parameters(select_algorithm.TritonTemplateKernel.__init__)
        self._fits_in_32_bits = SIMDScheduling.can_use_32bit_indexing
        self._buffer = ir.Buffer
        self._config = config
        self._graph = V
        self._lowerings = lowering.lowerings
        self._register = lowering.register_lowering
        self._fallback = lowering.fallback_handler
        self._empty = lowering.empty_strided
        self._to_dtype = lowering.to_dtype
        self._needs_realized_inputs = lowering.add_needs_realized_inputs
        self._fixed_layout = ir.FixedLayout
        self._contiguous_strides = ir.FlexibleLayout.contiguous_strides
        self._template = rowwise_template_class()
        self._grid = select_algorithm.SymbolicGridFn
        self._autotune = select_algorithm.autotune_select_algorithm
        self._realize = select_algorithm.realize_inputs
        self._example = select_algorithm.AlgorithmSelectorCache.benchmark_example_value

    def register(self, operator: Any, function: Callable[..., Any]) -> None:
        """Makes `function` what Inductor calls for the operator."""
        self._register(operator, type_promotion_kind=None)(function)

    def reads_memory(self, operators: Sequence[Any]) -> None:
        """Makes what the operators read be computed once; Inductor learns it by itself only after the first one."""
        self._needs_realized_inputs(list(operators))

    def opaque(self, operator: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the results of an operator that is called as it is."""
        return self._fallback(operator, add_to_fallback_set=False)(*args, **kwargs)

    def template(self, name: str, grid: Callable[..., tuple[Any, Any, Any]], source: str) -> Any:
        """Returns the template of a name, which is made once in a process."""
        return self._template.all_templates.get(name) or self._template(name, self._grid(grid), source)

    @property
    def autotunes(self) -> bool:
        """Whether `max_autotune` is asked for."""
        return bool(self._config.max_autotune)

    def fixed_size(self, size: Any) -> int:
        """Returns a size as a number; compiled code is then good for this number only."""
        return int(self._graph.graph.sizevars.guard_int(size))

    def realized(self, tensor: Any) -> Any:
        """Returns a tensor that stands in memory, its last dimension contiguous."""
        return self._realize(tensor)

    def empty(self, size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
        """Returns new memory for a kernel to write."""
        tensor = self._empty(size, None, dtype=dtype, device=device)
        tensor.realize()
        return tensor

    def contiguous_layout(self, size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
        """Returns the layout of a contiguous tensor."""
        return self._fixed_layout(device, dtype, list(size), self._contiguous_strides(size))

    def can_index(self, inputs: Sequence[Any], layout: Any) -> bool:
        """Whether offsets into a template's inputs and its output, of that layout, are computed without overflow."""
        output = self._buffer(name="output", layout=layout)
        sizes = [size for tensor in (*inputs, output) for size in tensor.get_size()]
        if self._has_wide_sizes or not any(getattr(size, "free_symbols", ()) for size in sizes):
            return True
        numel: Any = math.prod(layout.size)
        return bool(self._fits_in_32_bits(numel, [*inputs, output]))

    def permuted(self, tensor: Any, dims: Sequence[int]) -> Any:
        """Returns a view with the dimensions in another order."""
        return self._lowerings[torch.ops.aten.permute.default](tensor, list(dims))

    def sum_of_products(self, left: Any, right: Any, dtype: torch.dtype) -> Any:
        """Returns the sum over the last dimension of what two tensors, cast to `dtype`, give when multiplied."""
        cast, aten = self._to_dtype, torch.ops.aten
        product = self._lowerings[aten.mul.Tensor](cast(left, dtype), cast(right, dtype))
        return self._lowerings[aten.sum.dim_IntList](product, [-1])

    def chosen(
        self, name: str, choices: list[Any], inputs: list[Any], layout: Any, fills: Mapping[int, Callable[..., Any]]
    ) -> Any:
        """Returns the output of the fastest choice; a single one is taken untimed.

        Args:
            name: under which Inductor remembers what was fastest.
            choices: generated kernels.
            inputs: their tensors.
            layout: their output's.
            fills: position of an input -> what writes values into a tensor, where random ones will not do for timing.
        """

        def example(fill: Callable[..., Any]) -> Callable[[Any], torch.Tensor]:
            def generate(node: Any) -> torch.Tensor:
                tensor = self._example(node)
                fill(tensor)
                return tensor

            return generate

        generators = {position: example(fill) for position, fill in fills.items()}
        # Choosing later, together with the epilogue, would lose what the kernel writes beside its output.
        result = self._autotune(
            name, choices, inputs, layout, input_gen_fns=generators or None, return_multi_template=False
        )
        return result[0] if isinstance(result, tuple) else result  # since torch 2.13 with the choice


def template_tools() -> TemplateTools | None:
    """Returns what lowering to Triton templates takes; None, with a warning, in a torch that lacks a part of it."""
    try:
        return TemplateTools()
    except (ImportError, AttributeError) as error:
        logger.warning("torch %s: %s; kernels are not fused with what follows them.", torch.__version__, error)
        return None
