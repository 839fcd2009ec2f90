"""Adds nodes to a graph, in the graph's own dialect and with the fake values that torch.compile asks for.

Dynamo's graphs call torch functions and carry `meta["example_value"]`; exported graphs call aten operators and carry
`meta["val"]`.  A node's value is computed in the fake mode of its operands: Dynamo gives a backend another one.
"""

import contextlib
import operator
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses import FakeTensor

from nsa_compile.passes.predicate.tensor import size_expression
from nsa_compile.passes.predicate.writes import tensor_of

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


class GraphBuilder:
    """Adds nodes to one graph, before one node.

    Args:
        before: new nodes are inserted before it, in program order.
        device: where new tensors live.
    """

    def __init__(self, before: fx.Node, device: torch.device) -> None:
        self._before = before
        self._graph = before.graph
        self.device = device
        reference = next((node for node in self._graph.nodes if tensor_of(node) is not None), before)
        self._key = "val" if "val" in reference.meta and "example_value" not in reference.meta else "example_value"
        fake = tensor_of(reference)
        self._fake_mode = fake.fake_mode if isinstance(fake, FakeTensor) else None
        self._sizes: dict[sympy.Expr, int | fx.Node] = {}

    def value(self, node: fx.Node) -> Any:
        """The node's fake value."""
        return node.meta[self._key]

    def call(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call of torch's function (or aten's operator) `name`."""
        return self._add(_ATEN[name] if self._key == "val" else getattr(torch, name), args, kwargs)

    def _add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), self.value)
        with self._fake_mode or contextlib.nullcontext(), torch.no_grad():
            node.meta[self._key] = target(*values[0], **values[1])
        for inherited in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if inherited in self._before.meta:
                node.meta[inherited] = self._before.meta[inherited]
        return node

    def convert(self, node: Any, dtype: torch.dtype) -> fx.Node:
        """The tensor in another dtype; itself where it has the dtype."""
        if self.value(node).dtype == dtype:
            return node
        if self._key == "val":
            return self._add(torch.ops.aten.to.dtype, (node, dtype), {})
        return self._add(torch.Tensor.to, (node, dtype), {})

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
        before, self._before = self._before, place.next
        try:
            return self.call("clone", node)
        finally:
            self._before = before

    def scalar(self, number: int, dtype: torch.dtype) -> fx.Node:
        """A tensor of rank 0."""
        return self.call("full", [], number, dtype=dtype, device=self.device)

    def expand_rows(self, node: fx.Node, rows: sympy.Expr) -> fx.Node:
        """`[B|1, N]` as `[B, N]`."""
        shape = self.value(node).shape
        if size_expression(shape[0]) == rows:
            return node
        return self.call("broadcast_to", node, [self.size(rows), self.size(size_expression(shape[1]))])

    def index(self, node: fx.Node, places: list[fx.Node]) -> fx.Node:
        """`node[places]` for index tensors that are broadcast together."""
        if self._key == "val":
            return self._add(torch.ops.aten.index.Tensor, (node, places), {})
        return self._add(operator.getitem, (node, tuple(places)), {})

    def size(self, expression: sympy.Expr) -> Any:
        """A size: a number, or a node that holds it.

        Raises:
            NotImplementedError: nothing in the graph before the insertion point has the size's symbols.
        """
        expression = sympy.sympify(expression)
        if expression.is_Integer:
            return int(expression)
        if not self._sizes:
            self._collect_sizes()
        if expression not in self._sizes:
            self._sizes[expression] = self._computed_size(expression)
        return self._sizes[expression]

    def _collect_sizes(self) -> None:
        """Notes which nodes before the insertion point hold a size, and which tensors have it as a dimension."""
        dimensions: dict[sympy.Expr, tuple[int, fx.Node, int]] = {}
        for node in self._graph.nodes:
            if node is self._before:
                break
            value = node.meta.get(self._key)
            if isinstance(value, torch.SymInt):
                self._sizes.setdefault(size_expression(value), node)
            elif isinstance(value, torch.Tensor):
                # Inputs first, and small tensors before large ones: a size must not keep a dead mask alive.
                preference = 0 if node.op == "placeholder" else 1 + value.dim()
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt):
                        expression = size_expression(size)
                        if expression not in dimensions or preference < dimensions[expression][0]:
                            dimensions[expression] = (preference, node, dim)
        self._dimensions = dimensions

    def _computed_size(self, expression: sympy.Expr) -> fx.Node:
        if expression in self._dimensions:
            _, node, dim = self._dimensions[expression]
            if self._key == "val":
                return self._add(torch.ops.aten.sym_size.int, (node, dim), {})
            return self._add(torch.Tensor.size, (node, dim), {})
        if isinstance(expression, (sympy.Add, sympy.Mul)):
            target = operator.add if isinstance(expression, sympy.Add) else operator.mul
            parts = [self.size(part) for part in expression.args]
            result = parts[0]
            for part in parts[1:]:
                result = self._add(target, (result, part), {})
            return result
        raise NotImplementedError(f"no node holds the size {expression}")
