"""Numbers that a graph fixes: Python constants, and tensors that are filled with one."""

import contextlib
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from nsa_compile.passes.calls import operation
from nsa_compile.passes.metadata import number_of, recorded_constant, recorded_value
from nsa_compile.passes.predicate.writes import Writes

# Operation -> where its fill value stands among the arguments and what it is called, or the fill value itself.
_FILLS: Mapping[str, "tuple[int, str] | float"] = {
    "full": (1, "fill_value"),
    "full_like": (1, "fill_value"),
    "new_full": (2, "fill_value"),
    "scalar_tensor": (0, "s"),
    "tensor": (0, "data"),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), 0.0),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), 1.0),
}
# Arithmetic of such numbers.
_FUNCTIONS: Mapping[str, Callable[..., float]] = {
    "sqrt": math.sqrt,
    "rsqrt": lambda number: number**-0.5,
    "pow": operator.pow,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": lambda number: -number,
}
# Operations that keep every element.
_COPIES = frozenset(("lift_fresh_copy", "lift_fresh", "detach", "detach_", "clone", "alias", "contiguous"))


def constant_of(value: Any, reader: fx.Node, writes: Writes) -> "float | int | bool | None":
    """Returns the number that every element of an operand is, when `reader` reads it; None where that is not known.

    Args:
        value: a number, or a node.
        reader: the node whose operand it is.
        writes: the in-place writes of the graph.
    """
    number = number_of(value)
    if number is not None or not isinstance(value, fx.Node):
        return number
    while True:
        write = writes.last_write(value, writes.position(reader))
        if write is not None and operation(write.writer) not in _COPIES:
            return None
        if operation(value) not in _COPIES or not isinstance(value.args[0], fx.Node):
            break
        reader, value = value, value.args[0]
    known = recorded_constant(value)
    if known is None:
        known = getattr(recorded_value(value), "constant", None)
    if known is not None and known.numel() == 1:
        return known.item()
    fill = _FILLS.get(operation(value)) if value.op in ("call_function", "call_method") else None
    function = _FUNCTIONS.get(operation(value))
    if fill is None and function is not None and not value.kwargs:
        operands = [constant_of(operand, value, writes) for operand in value.args]
        known = [operand for operand in operands if operand is not None]
        with contextlib.suppress(ArithmeticError, TypeError, ValueError):
            return function(*known) if len(known) == len(operands) else None
    if isinstance(fill, tuple):
        place, name = fill
        return number_of(value.args[place] if len(value.args) > place else value.kwargs.get(name))
    return fill
