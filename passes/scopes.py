"""Graphs inside graphs: the bodies of checkpointed regions, nested compile regions and other higher-order operators."""

from collections.abc import Iterator
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils import _pytree as pytree

from nsa_compile.passes.sites import Scope

# Operators whose calls take further operands at the end of `args`, which become placeholders at the end of the body.
EXTENSIBLE = (
    "tag_activation_checkpoint",
    "invoke_subgraph",
    "wrap_with_set_grad_enabled",
    "wrap_with_autocast",
    "wrap",
)


def walk_scopes(graph_module: fx.GraphModule) -> Iterator[Scope]:
    """Yields the root's scope and those of all bodies below it, parents first, each body once."""
    yield from _walk(Scope(graph_module), seen={graph_module})


def _walk(scope: Scope, seen: set[fx.GraphModule]) -> Iterator[Scope]:
    yield scope
    calls_of: dict[str, list[fx.Node]] = {}
    for node in scope.graph_module.graph.nodes:
        for body in body_references(scope.graph_module, node):
            calls_of.setdefault(str(body.target), []).append(node)
    for target, calls in calls_of.items():
        body = attribute_of(scope.graph_module, target)
        if body in seen:
            continue
        seen.add(body)
        path = f"{scope.path}.{target}" if scope.path else target
        arguments = _common_arguments(scope.graph_module, body, calls)
        yield from _walk(Scope(body, path=path, parent=scope, calls=tuple(calls), arguments=arguments), seen)


def body_references(graph_module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Returns the `get_attr` nodes of the bodies that a higher-order call runs; empty for any other node."""
    if not isinstance(node.target, HigherOrderOperator):
        return []
    return [argument for argument in node.all_input_nodes if _is_body(graph_module, argument)]


def outward(inner: Scope, outer: Scope) -> Iterator[Scope]:
    """Yields the bodies to be left on the way from a scope to one around it: `inner` first, without `outer`."""
    scope: Scope | None = inner
    while scope is not None and scope.graph_module is not outer.graph_module:
        yield scope
        scope = scope.parent


def operator_name(node: fx.Node) -> str:
    """Returns the name of the operator that a node calls, such as "aten::add.Tensor"; "" where it calls none."""
    return node.target.name() if isinstance(node.target, OpOverload | HigherOrderOperator) else ""


def is_extensible(scope: Scope) -> bool:
    """Tells whether inputs can be handed to a body through its calls, or taken from it."""
    parent = scope.parent
    if parent is None:
        return False
    count = sum(node.op == "placeholder" for node in scope.graph_module.graph.nodes)
    return all(
        operator_name(call) in EXTENSIBLE and _operands(parent.graph_module, call, count) is not None
        for call in scope.calls
    )


def attribute_of(owner: Any, target: str) -> Any:
    """Follows a dotted attribute path; None where it leads nowhere."""
    for name in target.split("."):
        owner = getattr(owner, name, None)
    return owner


def _common_arguments(graph_module: fx.GraphModule, body: fx.GraphModule, calls: list[fx.Node]) -> dict[fx.Node, Any]:
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    operands = [_operands(graph_module, call, len(placeholders)) for call in calls]
    if any(each is None for each in operands):
        return {}
    return {
        placeholder: passed[0]
        for placeholder, *passed in zip(placeholders, *operands, strict=True)
        if all(other is passed[0] for other in passed)
    }


def _operands(graph_module: fx.GraphModule, call: fx.Node, count: int) -> "list[Any] | None":
    """The call's operands, as many as the body takes: those after the last body, less what configures the call."""
    bodies = [i for i, argument in enumerate(call.args) if _is_body(graph_module, argument)]
    if not bodies:
        return None
    operands = pytree.arg_tree_leaves(*call.args[bodies[-1] + 1 :])
    if operator_name(call) == "invoke_subgraph":
        operands = operands[1:]
    return operands if len(operands) == count else None


def _is_body(graph_module: fx.GraphModule, node: Any) -> bool:
    is_attribute = isinstance(node, fx.Node) and node.op == "get_attr"
    return is_attribute and isinstance(attribute_of(graph_module, str(node.target)), fx.GraphModule)
