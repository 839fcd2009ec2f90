"""The backend: `torch.compile(model, backend=nsa_backend)`."""

import contextlib
import contextvars
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from nsa_compile import compat
from nsa_compile.buffers import BufferReader
from nsa_compile.cache import with_cache_key
from nsa_compile.config import NSAConfig
from nsa_compile.lowering import register_templates
from nsa_compile.report import RewriteReport
from nsa_compile.rewriting import check_config, copy_graph, rewrite_graph

logger = logging.getLogger(__name__)

_OPTION_PREFIX = "nsa."
_collected: contextvars.ContextVar["list[RewriteReport] | None"] = contextvars.ContextVar("collected", default=None)


class NSABackend:
    """A `torch.compile` backend that rewrites attention to Native Sparse Attention and hands the graph to Inductor.

    Immutable, and equal by configuration: a model compiled with two equal backends is compiled once.  Everything but
    the rewrite is as with `backend="inductor"`: `mode=`, `options=`, dynamic shapes, training, caches.

    What happened is logged: `TORCH_LOGS=nsa_compile` shows a line for each graph, `TORCH_LOGS=+nsa_compile` the whole
    report and the graphs; `TORCH_TRACE` gets the artifacts `nsa_report`, `nsa_graph_before` and `nsa_graph_after`;
    `collect_reports()` hands reports to the program.  An attention that is declined is never an error.  A pass that
    fails raises `InternalError`: compiling a model other than asked would be worse than not compiling it.

    Args:
        config: the configuration; `NSAConfig()` by default.  `options={"nsa.num_selected": 32}` of `torch.compile`
            changes single fields.

    Raises:
        ConfigError: `config` is not an NSAConfig.

    Example:
        >>> compiled = torch.compile(model, backend=NSABackend(NSAConfig(num_selected=32)))
    """

    compiler_name = "nsa"
    # torch.compile and torch's registry of backends name a backend by this.
    __name__ = "nsa"

    def __init__(self, config: NSAConfig | None = None) -> None:
        self._config = check_config(config)

    @property
    def config(self) -> NSAConfig:
        """The configuration."""
        return self._config

    def __call__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compiles a graph that Dynamo captured.

        Args:
            graph_module: the graph, rewritten in place.
            example_inputs: its inputs.
            mode: as in `torch.compile`.
            options: as in `torch.compile`: those named `nsa.…` are fields of `NSAConfig`, all others Inductor's.

        Returns:
            The compiled function.

        Raises:
            UnknownOptionError: an option `nsa.…` is no field of `NSAConfig`.
            ConfigError: the options do not fit together.
            InternalError: a pass failed, which is a bug of nsa_compile.
            RuntimeError: Inductor knows no such mode or option.
        """
        reader = BufferReader(graph_module, example_inputs)
        dense = copy_graph(graph_module) if reader.may_read else graph_module
        with compat.users_errors():
            config, inductor_options = self._split(options or {})
            _rewrite_and_report(graph_module, config, reader)
        register_templates()
        patches = with_cache_key(compat.inductor_patches(mode, inductor_options), config)
        compiled = compat.compile_with_inductor(graph_module, example_inputs, patches)
        return reader.watched(compiled, dense) if reader.has_read else compiled

    def _split(self, options: Mapping[str, Any]) -> tuple[NSAConfig, dict[str, Any]]:
        """Separates this package's options from Inductor's."""
        ours = {name: value for name, value in options.items() if name.startswith(_OPTION_PREFIX)}
        changes = {name.removeprefix(_OPTION_PREFIX): value for name, value in ours.items()}
        return self._config.replace(**changes), {k: v for k, v in options.items() if k not in ours}

    def reset(self) -> None:
        """Forgets what `torch._dynamo.reset()` asks a backend to forget."""
        compat.reset_inductor()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.config == self.config

    def __hash__(self) -> int:
        return hash((type(self), self._config))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._config!r})"


nsa_backend = NSABackend()


@contextlib.contextmanager
def collect_reports() -> Iterator[list[RewriteReport]]:
    """Collects the reports of the graphs that NSA backends compile inside the `with` block, in this thread.

    Yields:
        The list that reports are added to, a report for each graph that is compiled.  Dynamo may compile a graph
        twice, and compiles anew when sizes change; code that is already compiled gives no report.

    Example:
        >>> with collect_reports() as reports:
        ...     compiled(input_ids)
        >>> print(reports[0])
    """
    reports: list[RewriteReport] = []
    token = _collected.set(reports)
    try:
        yield reports
    finally:
        _collected.reset(token)


def _rewrite_and_report(graph_module: fx.GraphModule, config: NSAConfig, reader: BufferReader) -> None:
    collected = _collected.get()
    is_wanted = collected is not None or logger.isEnabledFor(logging.DEBUG) or compat.is_traced()
    report = rewrite_graph(graph_module, config, keep_code=is_wanted, buffers=reader)
    if collected is not None:
        collected.append(report)
    _log(report)
    compat.trace_artifact("nsa_report", lambda: json.dumps(report.to_dict()), encoding="json")
    compat.trace_artifact("nsa_graph_before", lambda: report.graphs[0].before)
    compat.trace_artifact("nsa_graph_after", lambda: report.graphs[0].after)


def _log(report: RewriteReport) -> None:
    logger.debug("%s", report)
    logger.debug("graph before:\n%s\ngraph after:\n%s", report.graphs[0].before, report.graphs[0].after)
    if not report.sites:
        logger.info("no attention in this graph")
        return
    reasons = Counter(site.reason for site in report.declined)
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    # A model with none of its attentions rewritten is not what was asked for; short inputs are, by min_keys.
    level = logging.WARNING if not report.rewritten and set(reasons) - {"TOO_SHORT"} else logging.INFO
    logger.log(level, "%s%s", report.summary, f"; declined: {counts}" if counts else "")
