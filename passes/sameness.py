"""Tells when two nodes hold the same values, because they compute the same of the same."""

from typing import Any

from torch import fx

from nsa_compile.passes.calls import operation
from nsa_compile.passes.constants import constant_of
from nsa_compile.passes.metadata import dtype_of, same_shape, shape_of
from nsa_compile.passes.predicate.writes import Writes

# Operations of which masks are made anew in each place that uses them: the same operands give the same result.
_REPEATED = frozenset(
    (
        *("view", "reshape", "unsqueeze", "expand", "getitem", "select", "slice", "transpose", "permute", "to", "bool"),
        *("eq", "ne", "lt", "le", "gt", "ge", "logical_not", "bitwise_not", "invert", "logical_and", "and_"),
        *("tril", "triu"),
    )
)
_DEEPEST = 8


def hold_same(one: fx.Node, other: fx.Node, reader: fx.Node, writes: Writes, depth: int = 0) -> bool:
    """Whether two tensors are equal, element for element, until a node reads them.

    Args:
        one: a tensor.
        other: a tensor of the same graph.
        reader: a node after both; nothing may have been written to them, or to what they are made of, until then.
        writes: the in-place writes of the graph.
        depth: number of operations that were followed already.
    """
    start = min(writes.position(one), writes.position(other))
    if any(True for node in (one, other) for _ in writes.between(node, start, writes.position(reader))):
        return False
    if one is other:
        return True
    shapes = shape_of(one), shape_of(other)
    if depth > _DEEPEST or None in shapes or dtype_of(one) != dtype_of(other):
        return False
    if not same_shape(shapes[0] or (), shapes[1] or ()):
        return False
    number = constant_of(one, reader, writes)
    if number is not None:
        return constant_of(other, reader, writes) == number
    if operation(one) not in _REPEATED or operation(one) != operation(other) or one.target != other.target:
        return False

    def agree(mine: Any, theirs: Any) -> bool:
        if isinstance(mine, fx.Node) and isinstance(theirs, fx.Node):
            return (mine is theirs and shape_of(mine) is None) or hold_same(mine, theirs, reader, writes, depth + 1)
        if isinstance(mine, tuple | list) and isinstance(theirs, tuple | list):
            return len(mine) == len(theirs) and all(map(agree, mine, theirs))
        return type(mine) is type(theirs) and mine == theirs

    return (
        agree(one.args, other.args)
        and one.kwargs.keys() == other.kwargs.keys()
        and all(agree(one.kwargs[name], other.kwargs[name]) for name in one.kwargs)
    )
