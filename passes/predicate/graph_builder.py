"""Adds nodes to a graph, in the graph's own dialect and with the fake values that torch.compile asks for.

Dynamo's graphs call torch functions, exported graphs call aten operators.  A node's value is computed in the fake mode
of its operands: Dynamo gives a backend another one.
"""

import contextlib
import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses import FakeTensor

from nsa_compile.passes.emission import Emitter
from nsa_compile.passes.metadata import recorded_value, tensor_of
from nsa_compile.passes.predicate.tensor import size_expression
from nsa_compile.passes.predicate.terms import arguments_of

# Name -> what to call in an exported graph; Dynamo's graphs call torch's function of the same name.
_ATEN: dict[str, Any] = {
    "abs": torch.ops.aten.abs.default,
    "add": torch.ops.aten.add.Tensor,
    "arange": torch.ops.aten.arange.start,
    "broadcast_to": torch.ops.aten.broadcast_to.default,
    "clamp": torch.ops.aten.clamp.default,
    "clone": torch.ops.aten.clone.default,
    "eq": torch.ops.aten.eq.Scalar,
    "floor_divide": torch.ops.aten.floor_divide.default,
    "full": torch.ops.aten.full.default,
    "ge": torch.ops.aten.ge.Scalar,
    "gt": torch.ops.aten.gt.Scalar,
    "le": torch.ops.aten.le.Scalar,
    "logical_and": torch.ops.aten.logical_and.default,
    "logical_not": torch.ops.aten.logical_not.default,
    "logical_or": torch.ops.aten.logical_or.default,
    "lt": torch.ops.aten.lt.Scalar,
    "maximum": torch.ops.aten.maximum.default,
    "minimum": torch.ops.aten.minimum.default,
    "mul": torch.ops.aten.mul.Tensor,
    "narrow": torch.ops.aten.narrow.default,
    "ne": torch.ops.aten.ne.Scalar,
    "remainder": torch.ops.aten.remainder.Tensor,
    "searchsorted": torch.ops.aten.searchsorted.Tensor,
    "select": torch.ops.aten.select.int,
    "sub": torch.ops.aten.sub.Tensor,
    "transpose": torch.ops.aten.transpose.int,
    "unsqueeze": torch.ops.aten.unsqueeze.default,
    "where": torch.ops.aten.where.self,
}
# The operator where the second operand is a number or a size, if it has another overload for them.
_ATEN_BY_NUMBER: dict[str, Any] = {"remainder": torch.ops.aten.remainder.Scalar}
# How a size is computed from parts of it, by sympy's (and torch's) name for the operation.
_SIZE_OPERATIONS: dict[str, Any] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}


class HeldSizes:
    """Which nodes of a graph hold a size; the answers stay right while nodes are added."""

    def __init__(self, graph: fx.Graph) -> None:
        self._position = {node: number for number, node in enumerate(graph.nodes)}
        self._nodes: dict[sympy.Expr, fx.Node] = {}
        self._dimensions: dict[sympy.Expr, tuple[fx.Node, int]] = {}
        for node in self._position:
            value = recorded_value(node)
            if isinstance(value, torch.SymInt):
                self._nodes.setdefault(size_expression(value), node)
            elif isinstance(value, torch.Tensor):
                # The first tensors are inputs: a size must not keep a dead mask alive.
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt):
                        self._dimensions.setdefault(size_expression(size), (node, dim))

    def node(self, expression: sympy.Expr, before: fx.Node) -> fx.Node | None:
        """A node before another one that is the size."""
        node = self._nodes.get(expression)
        return node if node is not None and self._position[node] < self._position[before] else None

    def dimension(self, expression: sympy.Expr, before: fx.Node) -> tuple[fx.Node, int] | None:
        """A tensor made before a node, and the dimension of it that has the size."""
        held = self._dimensions.get(expression)
        return held if held is not None and self._position[held[0]] < self._position[before] else None

    def can_compute(self, expression: sympy.Expr, before: fx.Node) -> bool:
        """Whether the size can be computed from what is held before a node."""
        if expression.is_Integer or self.node(expression, before) or self.dimension(expression, before):
            return True
        known = expression.func.__name__ in _SIZE_OPERATIONS
        return known and all(self.can_compute(part, before) for part in arguments_of(expression))


class GraphBuilder:
    """Adds nodes to one graph, before one node.

    Args:
        graph_module: owner of the graph.
        before: new nodes are inserted before it, in program order.
        device: where new tensors live.
        held: the sizes that the graph holds.
    """

    def __init__(self, graph_module: fx.GraphModule, before: fx.Node, device: torch.device, held: HeldSizes) -> None:
        self.device = device
        self._graph_module = graph_module
        self._before = before
        self._emitter = Emitter(graph_module, before)
        self._held = held
        self._sizes: dict[sympy.Expr, int | fx.Node] = {}
        tensors = [node for node in graph_module.graph.nodes if tensor_of(node) is not None]
        self._is_exported = bool(tensors) and "example_value" not in tensors[0].meta
        fake = tensor_of(tensors[0]) if tensors else None
        self._fake_mode = fake.fake_mode if isinstance(fake, FakeTensor) else contextlib.nullcontext()

    def value(self, node: fx.Node) -> Any:
        """The node's fake value."""
        return recorded_value(node)

    def call(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call of torch's function (or aten's operator) `name`."""
        if not self._is_exported:
            return self._add(getattr(torch, name), args, kwargs)
        by_number = name in _ATEN_BY_NUMBER and tensor_of(args[1]) is None
        return self._add(_ATEN_BY_NUMBER[name] if by_number else _ATEN[name], args, kwargs)

    def _add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        values, named = fx.map_arg((args, kwargs), recorded_value)
        with self._fake_mode, torch.no_grad():
            value = target(*values, **named)
        node = self._emitter.call(target, args, kwargs, value)
        # The node that the new one stands before may record nothing.
        node.meta.setdefault("val" if self._is_exported else "example_value", value)
        return node

    def convert(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The tensor in another dtype; itself where it has the dtype."""
        if self.value(node).dtype == dtype:
            return node
        return self._add(torch.ops.aten.to.dtype if self._is_exported else torch.Tensor.to, (node, dtype), {})

    def require_binary(self, node: fx.Node, message: str) -> fx.Node:
        """Adds an error where a tensor does not hold 0 and 1 alone when the graph runs.

        Returns:
            A bool of rank 0, true where there is no error; what nobody reads may be dropped.
        """
        return self._add(torch.ops.nsa.require_binary.default, (node, message), {})

    def contiguous(self, node: fx.Node) -> fx.Node:
        """The tensor, contiguous."""
        if self.value(node).is_contiguous():
            return node
        return self.call("clone", node, memory_format=torch.contiguous_format)

    def snapshot(self, node: fx.Node, after: fx.Node) -> fx.Node:
        """A copy of a tensor as it is right after the node `after`, before later nodes write it in place."""
        place = after
        while place.op == "placeholder" and place.next.op == "placeholder":
            place = place.next
        here, self._emitter = self._emitter, Emitter(self._graph_module, place.next)
        try:
            return self.call("clone", node)
        finally:
            self._emitter = here

    def scalar(self, number: int, dtype: torch.dtype) -> fx.Node:
        """A tensor of rank 0."""
        return self.call("full", [], number, dtype=dtype, device=self.device)

    def expand(self, node: fx.Node, rows: sympy.Expr, columns: sympy.Expr) -> fx.Node:
        """`[B|1, N|1]` as `[rows, columns]`."""
        if tuple(size_expression(size) for size in self.value(node).shape) == (rows, columns):
            return node
        return self.call("broadcast_to", node, [self.size(rows), self.size(columns)])

    def index(self, node: fx.Node, places: Iterable[fx.Node]) -> fx.Node:
        """`node[places]` for index tensors that are broadcast together."""
        if self._is_exported:
            return self._add(torch.ops.aten.index.Tensor, (node, list(places)), {})
        return self._add(operator.getitem, (node, tuple(places)), {})

    def size(self, expression: sympy.Expr) -> Any:
        """A size: a number, or a node that holds it."""
        expression = sympy.sympify(expression)
        if expression.is_Integer:
            return int(expression)
        if expression not in self._sizes:
            self._sizes[expression] = self._held.node(expression, self._before) or self._computed_size(expression)
        return self._sizes[expression]

    def _computed_size(self, expression: sympy.Expr) -> fx.Node:
        held = self._held.dimension(expression, self._before)
        if held is not None:
            return self._add(torch.ops.aten.sym_size.int if self._is_exported else torch.Tensor.size, held, {})
        target = _SIZE_OPERATIONS[expression.func.__name__]
        parts = [self.size(part) for part in arguments_of(expression)]
        result = parts[0]
        for part in parts[1:]:
            result = self._add(target, (result, part), {})
        return result
