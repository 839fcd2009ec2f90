"""Which modules of a model have an attention that the pass would rewrite, found by the pass itself."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from nsa_compile import compat
from nsa_compile.config import NSAConfig
from nsa_compile.errors import NSAError
from nsa_compile.learned.parts import Sizes, names_of
from nsa_compile.passes.branches import ancestors
from nsa_compile.passes.find import find_sites
from nsa_compile.passes.hidden import HiddenStates
from nsa_compile.passes.metadata import scope_path
from nsa_compile.passes.plan import plan_rewrite
from nsa_compile.passes.scopes import attribute_of
from nsa_compile.passes.sites import AttentionSite, Operand, Rejection, Step

# Every attention that can be rewritten, however short the example.
_ALL_LENGTHS = NSAConfig(min_keys=0)


@dataclasses.dataclass(frozen=True)
class Finding:
    """An attention of a model.

    Attributes:
        module: dotted name of the module that holds it and the projections of its keys and values.
        sizes: what learned parts have to fit.
        originals: dotted name below the module -> a parameter that its keys or values are computed with.
        dtype: of the learned parts.
    """

    module: str
    sizes: Sizes
    originals: Mapping[str, Tensor]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Survey:
    """The attentions of a model.

    Attributes:
        findings: those that can have learned parts, in order of execution.
        refusals: for each of the others, what it is and why.
    """

    findings: tuple[Finding, ...]
    refusals: tuple[str, ...]


def survey(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
    """Captures a model's graphs and reads their attentions.

    A model that Dynamo captures whole is not run; one that it breaks into several graphs is run once.

    Args:
        model: the model, dense; it is captured in evaluation mode, and left as it was.
        args: inputs that it takes.
        kwargs: likewise.
    """
    reader = _Reader(model)
    with compat.undisturbed_dynamo(), _evaluation(model), torch.no_grad():
        try:
            compat.compile_isolated(_call, reader.whole, fullgraph=True, dynamic=False)(model, *args, **kwargs)
        except _Captured:
            return reader.result()
        except NSAError:
            raise
        except RuntimeError:
            # Dynamo's errors derive from it; an error of the model itself comes again.
            reader = _Reader(model)
            call = compat.compile_isolated(_call, reader.part, fullgraph=False, dynamic=False)
            call(model, *args, **kwargs)
    return reader.result()


class _Captured(BaseException):
    """Ends a call once its graph is captured; no `except Exception` of a model stops it."""


def _call(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    # The name `self` makes Dynamo name modules below the model: "L['self'].model.layers.0".
    return self(*args, **kwargs)


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Turns dropout and checkpointing off inside, module by module back to what they were."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class _Reader:
    """Two backends of `torch.compile` that read the attentions of what they are given."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._findings: list[Finding] = []
        self._refusals: list[str] = []

    def result(self) -> Survey:
        return Survey(tuple(self._findings), tuple(self._refusals))

    def whole(self, graph_module: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        """Reads a graph, and ends the call before it runs."""
        note = self._read(graph_module)

        def stop(*inputs: Any) -> None:
            note(inputs)
            raise _Captured

        return stop

    def part(self, graph_module: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        """Reads a graph, and runs it as it is."""
        note = self._read(graph_module)

        def run(*inputs: Any) -> Any:
            note(inputs)
            return graph_module.forward(*inputs)

        return run

    def _read(self, graph_module: fx.GraphModule) -> Callable[[tuple[Any, ...]], None]:
        """Reads the graph; returns what notes the attentions once the graph's inputs, parameters too, are there."""
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        plan, hidden = plan_rewrite(find_sites(graph_module), _ALL_LENGTHS), HiddenStates()
        pending: list[tuple[AttentionSite, Operand, list[fx.Node]]] = []
        for decision in plan.decisions:
            if decision.replacement is None:
                self._refuse(decision.place.module, decision.rejection)
                continue
            site = decision.replacement.site
            states = hidden.find(site)
            if isinstance(states, Rejection):
                self._refuse(decision.place.module, states)
            else:
                pending.append((site, states, _parameters(site, states.node)))

        def note(inputs: tuple[Any, ...]) -> None:
            values = dict(zip(placeholders, inputs, strict=True))
            for site, states, nodes in pending:
                read = [
                    values[node] if node in values else attribute_of(graph_module, str(node.target)) for node in nodes
                ]
                self._note(site, states, [each for each in read if isinstance(each, nn.Parameter)])
            pending.clear()

        return note

    def _refuse(self, module: str, rejection: Rejection | None) -> None:
        if rejection is not None:
            self._refusals.append(f"{module or 'the model'}: {rejection.reason.name}: {rejection.sentence}")

    def _note(self, site: AttentionSite, states: Operand, parameters: list[Tensor]) -> None:
        held = {id(parameter): parameter for parameter in parameters if parameter.is_floating_point()}
        for name in (*reversed(scope_path(site.node)), ""):
            module = self._model.get_submodule(name)
            originals = names_of(held.values(), module)
            if len(originals) == len(held):
                break
        else:
            return
        sizes = Sizes(*map(int, (states.shape[2], site.query_heads, site.key.shape[3], site.value.shape[3])))
        dtype = next((each.dtype for each in held.values()), site.dtype)
        # A module with several names goes by its first.
        first = next(name for name, each in self._model.named_modules() if each is module)
        self._findings.append(Finding(first, sizes, originals, dtype))


def _parameters(site: AttentionSite, hidden_states: fx.Node) -> list[fx.Node]:
    """The inputs of the root graph that a site's keys and values are computed from, within its layer."""
    found: dict[fx.Node, None] = {}
    for operand in (site.key, site.value):
        reached = [*ancestors(operand.node, hidden_states), *_operands(operand.steps)]
        for node in reached:
            resolved, _ = site.scope.resolve(node)
            if isinstance(resolved, fx.Node) and resolved.op in ("placeholder", "get_attr"):
                found[resolved] = None
    return list(found)


def _operands(steps: tuple[Step, ...]) -> Iterator[fx.Node]:
    for step in steps:
        for argument in step.args:
            if isinstance(argument, Operand):
                yield argument.node
                yield from _operands(argument.steps)
