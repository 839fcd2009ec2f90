"""`explain`: what the backend would do to a model, without compiling it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from nsa_compile import compat
from nsa_compile.buffers import BufferReader
from nsa_compile.config import NSAConfig
from nsa_compile.errors import NSAError
from nsa_compile.report import RewriteReport
from nsa_compile.rewriting import check_config, copy_graph, join_reports, rewrite_graph


def explain(
    model: Callable[..., Any], config: NSAConfig | None = None, *, dynamic: bool | None = None
) -> Callable[..., RewriteReport]:
    """Tells what `torch.compile(model, backend=NSABackend(config))` would do, as `torch._dynamo.explain` does.

    The model's graphs are captured and rewritten, and not compiled.  A model that Dynamo captures whole is not run
    at all; one that it breaks into several graphs is run once, dense.  Neither the model nor what is compiled
    already is changed.

    Args:
        model: a module or function; also one that was compiled before.
        config: the configuration; `NSAConfig()` by default.
        dynamic: as in `torch.compile`.

    Returns:
        A function that takes the model's inputs and returns the report.

    Raises:
        ConfigError: `config` is not an NSAConfig.

    Example:
        >>> print(explain(model)(input_ids))
    """
    settings = check_config(config)
    original = compat.original_callable(model)

    def explained(*args: Any, **kwargs: Any) -> RewriteReport:
        with compat.undisturbed_dynamo():
            whole, why_broken = _explain_whole(original, settings, dynamic, args, kwargs)
            if why_broken is None:
                return whole
            return _explain_broken(original, settings, dynamic, args, kwargs, why_broken)

    return explained


class _Captured(BaseException):
    """Ends a call once its graph is captured, before the graph runs; no `except Exception` of a model stops it."""


def _call(self: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    # The name `self` makes Dynamo call the model's parts as it does under torch.compile: "L['self'].model.layers.0".
    return self(*args, **kwargs)


def _explain_whole(
    model: Callable[..., Any],
    config: NSAConfig,
    dynamic: bool | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[RewriteReport, str | None]:
    """Explains a model that is one graph, without running it.

    Returns:
        The report, and None; or an empty report, and what breaks the graph.
    """
    reports: list[RewriteReport] = []

    def record(graph_module: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        reader = BufferReader(graph_module, inputs)
        with compat.users_errors():
            reports.append(rewrite_graph(graph_module, config, buffers=reader))
        return stop

    def stop(*_: Any) -> None:
        raise _Captured

    try:
        compat.compile_isolated(_call, record, fullgraph=True, dynamic=dynamic)(model, *args, **kwargs)
    except _Captured:
        pass
    except NSAError:
        raise
    except RuntimeError as broken:
        # Dynamo's own errors derive from it; an error of the model itself comes again when it runs.
        return join_reports(config, []), str(broken)
    return join_reports(config, reports), None


def _explain_broken(
    model: Callable[..., Any],
    config: NSAConfig,
    dynamic: bool | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    why_broken: str,
) -> RewriteReport:
    """Explains a model that is several graphs, by running it with each graph dense."""
    reports: list[RewriteReport] = []

    def record(graph_module: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        reason, graph = compat.break_reason(graph_module), copy_graph(graph_module)
        reader = BufferReader(graph, inputs)
        with compat.users_errors():
            reports.append(rewrite_graph(graph, config, break_reason=reason, buffers=reader))
        return graph_module.forward

    compat.compile_isolated(_call, record, fullgraph=False, dynamic=dynamic)(model, *args, **kwargs)
    note = f"Dynamo does not capture the model as one graph: {_first_line(why_broken)}"
    return join_reports(config, reports).with_note(note)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "for a reason that it does not give."
