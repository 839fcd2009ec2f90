"""The table of operations: name -> what the operation does to abstract tensors.

A handler is a function of a `Call` and of the operation's arguments under torch's names; the interpreter binds a
node's arguments to the handler's signature (`self` is called `input`).  Tensors arrive as `AbstractTensor`,
symbolic sizes as sympy expressions, everything else as it stands in the graph.  A handler that cannot say what
the result is raises `UnknownError`, and the result becomes data.  A new operation costs one handler, in the file of
its kind.
"""

import dataclasses
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import sympy
import torch
from torch import fx

from nsa_compile.passes.metadata import recorded_value
from nsa_compile.passes.predicate.cases import formula_of
from nsa_compile.passes.predicate.tensor import AbstractTensor, Leaf, aligned, leaf_tensor, make_tensor, scalar
from nsa_compile.passes.predicate.terms import Formula, UnknownError
from nsa_compile.passes.predicate.writes import target_name


@dataclasses.dataclass(frozen=True)
class Call:
    """One application of an operation.

    Attributes:
        node: the node that applies it.
        shape: of the result.
        dtype: of the result.
        make_leaf: makes the result data; takes the cause, and what is known of it.
        leaf: finds a leaf by its function's name.
    """

    node: fx.Node
    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    make_leaf: Callable[..., Leaf]
    leaf: Callable[[str], Leaf]

    def data(self, cause: str, same_as: Hashable = None, **known: Any) -> AbstractTensor:
        """The result as data.

        Args:
            cause: why it is data.
            same_as: calls with equal `same_as` make equal data.
            known: what is known of the data, under the names of `Leaf`'s attributes.
        """
        return leaf_tensor(self.make_leaf(cause, same_as=same_as, **known))


Handler = Callable[..., AbstractTensor]


@dataclasses.dataclass(frozen=True)
class Operation:
    """A handler, and how to bind arguments to it.

    Attributes:
        handler: the function.
        reads: whether the handler takes the node's arguments; creation from a shape takes none.
    """

    handler: Handler
    reads: bool = True


OPERATIONS: dict[str, Operation] = {}

# Python's operators under the names of torch's functions.
_PYTHON_OPERATORS = {
    "and_": "bitwise_and",
    "and": "bitwise_and",
    "or_": "bitwise_or",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "inv": "bitwise_not",
    "truediv": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "iand": "bitwise_and",
    "ior": "bitwise_or",
    "ixor": "bitwise_xor",
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "ifloordiv": "floor_divide",
    "imod": "remainder",
    "radd": "add",
    "rmul": "mul",
    "rsub": "rsub",
    "rand": "bitwise_and",
    "ror": "bitwise_or",
}
# Say nothing of the result's values.
_IGNORED = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking", "requires_grad", "copy"})


def operation(*names: str, reads: bool = True) -> Callable[[Handler], Handler]:
    """Registers a handler under the operation's names."""

    def register(handler: Handler) -> Handler:
        for name in names:
            OPERATIONS[name] = Operation(handler, reads)
        return handler

    return register


def find_operation(node: fx.Node) -> Operation | None:
    """The table's entry for what the node calls, in-place forms included; None where there is none.

    An item of a call that returns several tensors is one operation, whose first argument is the item's number.
    """
    maker = maker_of_item(node)
    if maker is not None:
        return OPERATIONS.get(f"item of {target_name(maker)}")
    name = target_name(node)
    module = getattr(node.target, "__module__", "")
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        name = _PYTHON_OPERATORS.get(name, name)
    elif module in ("_operator", "operator"):
        name = _PYTHON_OPERATORS.get(name, name)
    elif name not in OPERATIONS and name.endswith("_"):
        name = name[:-1]
    return OPERATIONS.get(name)


def maker_of_item(node: fx.Node) -> fx.Node | None:
    """The call that returns several tensors, for a node that picks one of them."""
    if target_name(node) != "getitem" or not isinstance(node.args[0], fx.Node) or not isinstance(node.args[1], int):
        return None
    return node.args[0] if isinstance(recorded_value(node.args[0]), (tuple, list)) else None


def bind(handler: Handler, call: Call) -> inspect.BoundArguments:
    """The call and its node's arguments, bound to the handler's parameters.

    Raises:
        UnknownError: the handler does not know an argument.
    """
    node = call.node
    maker = maker_of_item(node)
    called, item = (node, ()) if maker is None else (maker, (node.args[1],))
    kwargs = {("input" if key == "self" else key): value for key, value in called.kwargs.items() if key not in _IGNORED}
    try:
        return inspect.signature(handler).bind(call, *item, *called.args, **kwargs)
    except TypeError as error:
        raise UnknownError(f"it is called in a way that the prover does not know ({error})") from None


def as_tensor(value: Any) -> AbstractTensor:
    """An operand: a tensor, or a number as a tensor of rank 0.

    Raises:
        UnknownError: it is neither.
    """
    if isinstance(value, AbstractTensor):
        return value
    if isinstance(value, (bool, int, float, sympy.Expr)):
        return scalar(value)
    raise UnknownError(f"it takes {value!r}, which the prover cannot follow")


def logic(call: Call, connect: Callable[..., Formula], *operands: Any) -> AbstractTensor:
    """A bool tensor: `connect` applied to whether the operands' elements are true."""
    rank = len(call.shape)
    formulas = [formula_of(aligned(as_tensor(operand), rank)) for operand in operands]
    return make_tensor(call.shape, torch.bool, connect(*formulas))


def as_size(value: Any) -> sympy.Expr:
    """An integer argument as an expression: a number, a size, or a one-element tensor.

    Raises:
        UnknownError: it is none of these.
    """
    tensor = as_tensor(value)
    if tensor.dtype.is_floating_point or any(size != 1 for size in tensor.shape):
        raise UnknownError("it takes an offset that is not an integer")
    return tensor.number()


def dimension(value: Any, rank: int) -> int:
    """A dimension's number, counted from the front.

    Raises:
        UnknownError: it is not a number.
    """
    if not isinstance(value, int) or not -rank <= value < max(rank, 1):
        raise UnknownError(f"dimension {value!r} of {rank} is not known")
    return value % rank
