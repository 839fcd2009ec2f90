"""Evaluates the nodes that make a mask as abstract tensors, without running them.

Only what the mask needs is evaluated, each node once for all masks of a graph, without recursion.  What cannot be
followed becomes data (`Leaf`): it blocks a proof only where the mask depends on it in a way that matters.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from nsa_compile.passes.metadata import fixed_number_of, recorded_constant, recorded_value, tensor_of
from nsa_compile.passes.predicate import (
    operations_arithmetic,
    operations_creation,
    operations_indexing,
    operations_logic,
    operations_scans,
    operations_views,
)
from nsa_compile.passes.predicate.cases import size_of
from nsa_compile.passes.predicate.constants import abstract_constant
from nsa_compile.passes.predicate.conversion import WIDE_INTEGERS
from nsa_compile.passes.predicate.mapping import MappedIndices
from nsa_compile.passes.predicate.operations import Call, Operation, as_tensor, bind, find_operation, maker_of_item
from nsa_compile.passes.predicate.ordering import sorted_axis
from nsa_compile.passes.predicate.overwriting import overwrite
from nsa_compile.passes.predicate.tensor import (
    AbstractTensor,
    Leaf,
    binary_tensor,
    leaf_tensor,
    number,
    size_expression,
)
from nsa_compile.passes.predicate.terms import RoundedError, UnknownError
from nsa_compile.passes.predicate.writes import Write, Writes, target_name
from nsa_compile.passes.sites import Scope

# Gives the value of a tensor that nothing can change unnoticed (a buffer, a constant), or None.
ConstantReader = Callable[[fx.Node, Scope], "torch.Tensor | None"]

# The handlers register themselves when their files are imported.
TABLES = (
    operations_arithmetic,
    operations_creation,
    operations_indexing,
    operations_logic,
    operations_scans,
    operations_views,
)
# Tracers keep tensors that the traced code made from numbers under such names; they belong to the graph.
_BAKED = re.compile(r"^_tensor_constant\d+$")
# Larger formulas than this are no mask that the prover could read.
_LARGEST = 250


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a read value comes from.

    Attributes:
        node: the node that leaves the value.
        scope: the graph that holds it.
        stale: the memory was overwritten in between, and what it holds is not known.
        patch: part of the memory was overwritten in between, last by this write.
    """

    node: fx.Node
    scope: Scope = dataclasses.field(compare=False)
    stale: bool = False
    patch: Write | None = None


class Interpreter:
    """Abstract values of nodes, memoised.

    Args:
        read_constant: gives the values of tensors that may be read at compile time.
        binary: names of data from outside that is supposed to hold 0 and 1 alone.
    """

    def __init__(self, read_constant: ConstantReader | None = None, binary: frozenset[str] = frozenset()) -> None:
        self._read_constant = read_constant
        self._binary = binary
        self._values: dict[Source, AbstractTensor] = {}
        self._writes: dict[fx.Graph, Writes] = {}
        self._leaves: dict[str, Leaf] = {}
        self._equal: dict[tuple[Hashable, fx.GraphModule], Leaf] = {}
        self._mapped = MappedIndices()

    def leaf(self, name: str) -> Leaf:
        """The leaf whose function has this name."""
        return self._leaves[name]

    def writes(self, scope: Scope) -> Writes:
        """The in-place writers of a scope's graph."""
        graph = scope.graph_module.graph
        if graph not in self._writes:
            self._writes[graph] = Writes(graph)
        return self._writes[graph]

    def assume(self, node: fx.Node, scope: Scope, position: sympy.Symbol) -> None:
        """Makes a placeholder the position that a predicate is asked about."""
        self._values[Source(node, scope)] = AbstractTensor((), torch.int64, number(position))
        self.depend(node, (position,))

    def depend(self, node: fx.Node, positions: tuple[sympy.Symbol, ...]) -> None:
        """Makes a placeholder of a predicate data that depends on positions."""
        self._mapped.assume(node, positions)

    def evaluate(self, node: fx.Node, scope: Scope, reader: fx.Node) -> AbstractTensor:
        """What `reader` sees when it reads `node`, both in `scope`."""
        root = self._source(node, scope, self.writes(scope).position(reader))
        if not isinstance(root, Source):
            return as_tensor(root)
        needed: set[Source] = set()
        pending = [root]
        while pending:
            current = pending.pop()
            if current not in needed and current not in self._values:
                needed.add(current)
                pending.extend(self._needs(current))
        for source in sorted(needed, key=self._order):
            self._values[source] = self._compute(source)
        return self._values[root]

    def _order(self, source: Source) -> tuple[int, ...]:
        """Place in the program, through the calls that lead to a body; a patched tensor comes after its writer."""
        scope = source.scope
        made_by = source.node if source.patch is None else source.patch.writer
        order = [self.writes(scope).position(made_by), source.patch is not None]
        while scope.parent is not None and scope.calls:
            order.insert(0, self.writes(scope.parent).position(scope.calls[0]))
            scope = scope.parent
        return tuple(order)

    def _source(self, node: fx.Node, scope: Scope, place: int) -> Any:
        """The `Source` of what is read from `node` before `place`, followed out of bodies; or a constant."""
        write = self.writes(scope).last_write(node, place)
        if write is not None and not write.whole:
            return Source(node, scope, patch=write) if write.views else Source(node, scope, stale=True)
        current = node if write is None else write.writer
        if current.op != "placeholder" or scope.parent is None or current not in scope.arguments:
            return Source(current, scope)
        argument, parent = scope.arguments[current], scope.parent
        if not isinstance(argument, fx.Node):
            return argument
        calls = sorted(self.writes(parent).position(call) for call in scope.calls)
        if any(True for _ in self.writes(parent).between(argument, calls[0] - 1, calls[-1])):
            return Source(current, scope, stale=True)
        return self._source(argument, parent, calls[0])

    def _operation(self, node: fx.Node) -> Operation | None:
        if node.op not in ("call_function", "call_method") or _result(node) is None:
            return None
        return find_operation(node)

    def _needs(self, source: Source) -> list[Source]:
        """The values that must be known before the source's own can be computed."""
        if source.patch is not None:
            writer = source.patch.writer
            before = self._source(source.node, source.scope, self.writes(source.scope).position(writer))
            return [need for need in (before, Source(writer, source.scope)) if isinstance(need, Source)]
        operation = None if source.stale else self._operation(source.node)
        if operation is None or not operation.reads:
            return []
        reading = maker_of_item(source.node) or source.node
        needs = [self._read(argument, source) for argument in reading.all_input_nodes]
        return [need for need in needs if isinstance(need, Source)]

    def _read(self, argument: fx.Node, source: Source) -> Any:
        """What the source's node reads from an argument: a `Source`, an expression, or None where it is no number."""
        if tensor_of(argument) is not None:
            reading = maker_of_item(source.node) or source.node
            return self._source(argument, source.scope, self.writes(source.scope).position(reading))
        value = recorded_value(argument)
        if isinstance(value, torch.SymInt):
            return size_expression(value)
        # Under dynamic shapes the number that a module masks with is an input too.
        value = fixed_number_of(argument) if isinstance(value, torch.SymFloat) else value
        return value if isinstance(value, (bool, int, float)) else None

    def _compute(self, source: Source) -> AbstractTensor:
        node = source.node
        if source.stale:
            return leaf_tensor(self._make_leaf(source, "it is overwritten in place through another view"))
        if source.patch is not None:
            return self._in_order(source, self._patched(source, source.patch))
        operation = self._operation(node)
        if operation is None:
            constant = self._constant(source)
            if constant is not None:
                return constant
            outside = node.op in ("placeholder", "get_attr")
            cause = "it comes from outside the graph" if outside else f"the prover does not know {target_name(node)}"
            leaf = self._make_leaf(source, cause)
            return binary_tensor(leaf) if leaf.name in self._binary else leaf_tensor(leaf)
        try:
            recorded = _result(node)
            if recorded is None:
                raise UnknownError("the graph does not record what it makes")
            value = self._apply(operation, self._call(source, recorded.dtype), source)
            if size_of(value.value) > _LARGEST:
                raise UnknownError("its value depends on too many conditions")
            if value.rank != recorded.dim():
                raise UnknownError("its shape is not the one that the graph records")
        except UnknownError as error:
            data = self._data_read(source) if isinstance(error, RoundedError) else ()
            return leaf_tensor(self._make_leaf(source, str(error), computed_of=data))
        except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
            # Arguments of a kind that the handler was not written for; the result is data then.
            return leaf_tensor(self._make_leaf(source, f"its arguments cannot be followed ({error})"))
        return self._in_order(source, value)

    def _data_read(self, source: Source) -> tuple[str, ...]:
        """Names of the data in the numbers that a node reads."""
        values = (self._values[need].value for need in self._needs(source))
        numbers = (number for value in values if isinstance(value, tuple) for _, number in value)
        return tuple(sorted({part.func.__name__ for number in numbers for part in number.atoms(AppliedUndef)}))

    def _in_order(self, source: Source, value: AbstractTensor) -> AbstractTensor:
        """Makes numbers of two cases that never decrease data of which just this is known: comparisons need no more."""
        cases = value.value
        along = sorted_axis(cases, value.rank, self.leaf) if isinstance(cases, tuple) else None
        if along is None or value.dtype not in WIDE_INTEGERS:
            return value
        return leaf_tensor(
            self._make_leaf(source, "it joins data in order", same_as=(value.shape, cases), sorted_axis=along)
        )

    def _apply(self, operation: Operation, call: Call, source: Source) -> AbstractTensor:
        """Runs an operation's handler on the abstract values of the arguments."""
        if not operation.reads:
            return operation.handler(call)
        bound = bind(operation.handler, call)
        for name, argument in bound.arguments.items():
            bound.arguments[name] = self._argument(argument, source)
        return operation.handler(*bound.args, **bound.kwargs)

    def _argument(self, argument: Any, source: Source) -> Any:
        """An argument of a node as handlers take it."""
        if isinstance(argument, fx.Node):
            read = self._read(argument, source)
            return self._values[read] if isinstance(read, Source) else read
        if isinstance(argument, slice):
            parts = (argument.start, argument.stop, argument.step)
            return slice(*(self._argument(part, source) for part in parts))
        if isinstance(argument, (tuple, list)):
            return type(argument)(self._argument(item, source) for item in argument)
        return argument

    def _patched(self, source: Source, write: Write) -> AbstractTensor:
        """A tensor part of which another node has overwritten through a view."""
        before, written = (self._values[need] for need in self._needs(source))
        try:
            return overwrite(before, written, [self._view(view, source.scope) for view in write.views or ()])
        except UnknownError as error:
            stale = dataclasses.replace(source, patch=None, stale=True)
            return leaf_tensor(self._make_leaf(stale, f"it is overwritten through a view: {error}"))

    def _view(self, node: fx.Node, scope: Scope) -> Callable[[AbstractTensor], AbstractTensor]:
        """What a view does to a tensor."""
        source = Source(node, scope)
        operation = self._operation(node)
        if operation is None or maker_of_item(node) is not None:
            raise UnknownError(f"the prover does not know the view {target_name(node)}")

        def view(tensor: AbstractTensor) -> AbstractTensor:
            bound = bind(operation.handler, self._call(source, tensor.dtype))
            for name, argument in bound.arguments.items():
                bound.arguments[name] = tensor if argument is node.args[0] else self._argument(argument, source)
            return operation.handler(*bound.args, **bound.kwargs)

        return view

    def _call(self, source: Source, dtype: torch.dtype) -> Call:
        result = _result(source.node)
        if result is None:
            raise UnknownError("it makes no tensor")
        return Call(
            node=source.node,
            shape=tuple(size_expression(size) for size in result.shape),
            dtype=dtype,
            make_leaf=functools.partial(self._make_leaf, source),
            leaf=self.leaf,
        )

    def _constant(self, source: Source) -> AbstractTensor | None:
        node, tensor = source.node, None
        if node.op == "get_attr" and _BAKED.search(str(node.target)):
            tensor = getattr(source.scope.graph_module, str(node.target), None)
        elif recorded_constant(node) is not None:
            tensor = recorded_constant(node)
        elif node.op in ("placeholder", "get_attr") and self._read_constant is not None:
            tensor = self._read_constant(node, source.scope)
        return None if tensor is None else abstract_constant(tensor)

    def _make_leaf(
        self,
        source: Source,
        cause: str,
        same_as: Hashable = None,
        computed_of: tuple[str, ...] = (),
        **known: Any,
    ) -> Leaf:
        node = source.node
        written_by = node if source.patch is None else source.patch.writer
        equal = self._equal.get((same_as, source.scope.graph_module)) if same_as is not None else None
        writes = self.writes(source.scope)
        if equal is not None and writes.position(equal.written_by) < writes.position(written_by):
            return equal
        result = _result(node)
        if result is None:
            raise UnknownError("it makes no tensor")
        state = "overwritten" if source.stale else written_by.name if source.patch is not None else ""
        name = ".".join(part for part in (source.scope.path, node.name, state) if part)
        mapped = self._mapped.of(node, source.scope)
        leaf = Leaf(
            name=name,
            node=_changed(node),
            written_by=written_by,
            scope=source.scope,
            dtype=result.dtype,
            shape=tuple(size_expression(size) for size in result.shape),
            cause=cause,
            stale=source.stale,
            mapped=mapped,
            computed_of=computed_of,
            # What is known of data along its own axes is not known of the others.
            **({} if mapped else known),
        )
        self._leaves[name] = leaf
        self._equal[same_as, source.scope.graph_module] = leaf
        return leaf


def _changed(node: fx.Node) -> fx.Node:
    """The node whose tensor an assignment to elements changes; any other node itself."""
    if target_name(node) in ("setitem", "__setitem__") and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return node


def _result(node: fx.Node) -> torch.Tensor | None:
    """The tensor that the node makes or, for an assignment to elements, changes."""
    return tensor_of(_changed(node))
