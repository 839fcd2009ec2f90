"""Numbers that a graph fixes: Python constants, and tensors that are filled with one."""

from collections.abc import Mapping
from typing import Any

from torch import fx

from nsa_compile.passes.calls import operation
from nsa_compile.passes.metadata import number_of, recorded_value
from nsa_compile.passes.predicate.writes import Writes

# Operation -> where its fill value stands among the arguments and what it is called, or the fill value itself.
_FILLS: Mapping[str, "tuple[int, str] | float"] = {
    "full": (1, "fill_value"),
    "full_like": (1, "fill_value"),
    "new_full": (2, "fill_value"),
    "scalar_tensor": (0, "s"),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), 0.0),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), 1.0),
}


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
    if writes.last_write(value, writes.position(reader)) is not None:
        return None
    known = getattr(recorded_value(value), "constant", None)
    if known is not None and known.numel() == 1:
        return known.item()
    fill = _FILLS.get(operation(value)) if value.op in ("call_function", "call_method") else None
    if isinstance(fill, tuple):
        place, name = fill
        return number_of(value.args[place] if len(value.args) > place else value.kwargs.get(name))
    return fill
