"""Running a model with learned parts without `torch.compile`: the same graph, rewritten, operator by operator."""

import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from nsa_compile import compat
from nsa_compile.config import NSAConfig
from nsa_compile.errors import NotRewrittenError
from nsa_compile.passes.sites import Reason
from nsa_compile.rewriting import rewrite_graph

logger = logging.getLogger(__name__)

# Attentions without learned parts stay as the model has them.
_LEARNED_ONLY = NSAConfig(combine="gated")
_compiled: "weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]]" = weakref.WeakKeyDictionary()
_running = threading.local()


def run_rewritten(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs a module's forward with the attentions that have learned parts rewritten.

    Dynamo captures the forward as under `torch.compile`, and the rewritten graph runs as it is, without Inductor.

    Args:
        module: a module of an attached class.
        args: arguments of its forward.
        kwargs: likewise.

    Raises:
        NotRewrittenError: an attention with learned parts cannot be rewritten, or was not captured.
    """
    modules: set[int] = _running.__dict__.setdefault("modules", set())
    if id(module) in modules:
        raise NotRewrittenError(
            f"Dynamo did not capture the forward of {type(module).__name__}, which has learned parts, and would have "
            "run it dense: see TORCH_LOGS=graph_breaks,recompiles; torch.compile(model, backend='nsa', fullgraph=True) "
            "says what stops it."
        )
    if module not in _compiled:
        _compiled[module] = compat.compile_isolated(_call, _run_graph, fullgraph=False, dynamic=None)
    modules.add(id(module))
    try:
        # Lengths, modes and arguments of a whole program may differ more often than Dynamo expects of one function.
        with compat.no_recompile_limit():
            return _compiled[module](module, *args, **kwargs)
    finally:
        modules.discard(id(module))


def _call(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    # The class's forward: the caller may be one that was put before it on the instance, as accelerate does.
    return type(self).forward(self, *args, **kwargs)


def _run_graph(graph_module: fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
    """A backend that rewrites and does not compile."""
    with compat.users_errors():
        report = rewrite_graph(graph_module, _LEARNED_ONLY, keep_code=False)
        for use in report.unused_parts:
            if use.reason != Reason.TOO_SHORT.name:
                raise NotRewrittenError(
                    f"{use.module or 'the model'} has learned parts, and its attention is not rewritten: "
                    f"{use.sentence} Without them it would run dense."
                )
    return graph_module.forward
