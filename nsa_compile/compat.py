"""The private parts of torch that the backend and `explain` need, each with what happens where it is missing.

Written against torch 2.11 and 2.13.  Where a torch lacks one of them, the feature that needs it is left out with a
warning, and what is compiled stays correct.
"""

import contextlib
import importlib
import inspect
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any, cast

import torch
from torch import fx

from nsa_compile.errors import NSAError

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
    function: Callable[..., Any], backend: Callable[..., Any], *, fullgraph: bool, dynamic: bool | None
) -> Callable[..., Any]:
    """Compiles so that recompilations are counted apart from the user's, where torch can do that."""
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


@contextlib.contextmanager
def undisturbed_dynamo() -> Iterator[None]:
    """Lets Dynamo trace inside, and leaves its caches outside as they were.

    Inside, sizes are seen for the first time (nothing is dynamic because of an earlier call) and no recompilation
    limit holds.  Afterwards, code that was compiled only inside is forgotten.
    """
    from torch._dynamo import config

    compiled: dict[int, CodeType] = {}
    limits = {name: 1 << 30 for name in ("recompile_limit", "accumulated_recompile_limit") if hasattr(config, name)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch(limits))
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
