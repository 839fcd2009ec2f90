"""Products of two tensors summed over common axes: `matmul` in all its forms, and `einsum`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from nsa_compile.passes.axes import Dimension, Dimensions, dimension, dimensions, flat, unify
from nsa_compile.passes.calls import arguments, operation
from nsa_compile.passes.layout import LabelledTensor
from nsa_compile.passes.metadata import fixed_number_of, is_cache, is_parameter, shape_of
from nsa_compile.passes.sites import Shape
from nsa_compile.passes.views import is_view


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A product, with the axes of its operands and result.

    Attributes:
        node: the product.
        left: first operand.
        right: second operand.
        dims: dimensions of the result.
        alpha: a number that the product is multiplied by.
        added: what is added to the product, with its factor; None where nothing is.
    """

    node: fx.Node
    left: LabelledTensor
    right: LabelledTensor
    dims: Dimensions
    alpha: float = 1.0
    added: tuple[fx.Node, float] | None = None


def read_contraction(node: fx.Node) -> Contraction | None:
    """Reads a node as a product of two tensors; None where it is none, or of another form."""
    name = operation(node)
    if name == "einsum":
        return _read_einsum(node)
    bound = arguments(node) if name in ("matmul", "baddbmm") else None
    if bound is None:
        return None
    if name == "matmul":
        return _product(node, bound.get("input"), bound.get("other"))
    product = _product(node, bound.get("batch1"), bound.get("batch2"))
    alpha, beta = fixed_number_of(bound.get("alpha", 1)), fixed_number_of(bound.get("beta", 1))
    if product is None or alpha is None or beta is None or not isinstance(bound.get("input"), fx.Node):
        return None
    return dataclasses.replace(product, alpha=alpha, added=(bound["input"], beta) if beta else None)


def is_contraction(node: fx.Node) -> bool:
    """Tells whether a node multiplies tensors and sums, whether or not it can be read."""
    return operation(node) in ("matmul", "baddbmm", "einsum")


def is_weight(node: fx.Node) -> bool:
    """Tells whether a node is a parameter, or a view or cast of one."""
    while (is_view(node) or operation(node) == "getitem") and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return is_parameter(node) and not is_cache(node)


def _product(node: fx.Node, left: Any, right: Any) -> Contraction | None:
    left_shape, right_shape = shape_of(left), shape_of(right)
    if left_shape is None or right_shape is None or min(len(left_shape), len(right_shape)) < 2:
        return None
    left_dims, right_dims = dimensions(left_shape), dimensions(right_shape)
    if not unify(left_dims[-1], right_dims[-2]):
        return None
    batch: list[Dimension] = []
    for number in range(max(len(left_dims), len(right_dims)) - 2, 0, -1):
        mine, theirs = (dims[-2 - number] if len(dims) >= 2 + number else () for dims in (left_dims, right_dims))
        if mine and theirs and not unify(mine, theirs):
            return None
        batch.append(mine or theirs)
    return Contraction(
        node,
        LabelledTensor(left, left_dims),
        LabelledTensor(right, right_dims),
        (*batch, left_dims[-2], right_dims[-1]),
    )


def _read_einsum(node: fx.Node) -> Contraction | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    nodes = [operand for operand in operands if isinstance(operand, fx.Node)]
    shapes = [shape for node in nodes if (shape := shape_of(node)) is not None]
    if not isinstance(equation, str) or not len(operands) == len(shapes) == 2:
        return None
    terms = _terms(equation.replace(" ", ""), shapes)
    if terms is None:
        return None
    (left, right), result = terms
    axes: dict[str, Dimension] = {}
    for term, shape in zip((left, right), shapes, strict=True):
        for letter, size in zip(term, shape, strict=True):
            own = dimension(size)
            if own and axes.get(letter) and not unify(own, axes[letter]):
                return None
            axes[letter] = axes.get(letter) or own
    summed_alone = [axes[letter] for letter in set(left) ^ set(right) if letter not in result]
    if any(summed_alone) or any(letter not in axes for letter in result):
        return None
    dims = [
        tuple(_own(axes[letter], size) for letter, size in zip(term, shape, strict=True))
        for term, shape in zip((left, right), shapes, strict=True)
    ]
    return Contraction(
        node,
        LabelledTensor(nodes[0], dims[0]),
        LabelledTensor(nodes[1], dims[1]),
        tuple(axes[letter] for letter in result),
    )


def read_einsum_sum(node: fx.Node) -> int | None:
    """Reads an einsum of one tensor that leaves one dimension out: the dimension that it sums over."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    shape = shape_of(operands[0]) if len(operands) == 1 else None
    terms = _terms(equation.replace(" ", ""), [shape]) if isinstance(equation, str) and shape is not None else None
    if terms is None:
        return None
    (term,), result = terms
    summed = [number for number in range(len(term)) if term[:number] + term[number + 1 :] == result]
    return summed[0] if summed else None


def _own(axes: Dimension, size: Any) -> Dimension:
    """The axes of a letter in one operand: none where the operand is broadcast along it."""
    return axes if dimension(size) else ()


def _terms(equation: str, shapes: Sequence[Shape]) -> "tuple[list[list[str]], list[str]] | None":
    """Splits an equation into lists of letters; an ellipsis becomes letters of its own."""
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if len(terms) != len(shapes):
        return None
    if not arrow:
        once = sorted(letter for letter in set(inputs) - set(",.") if inputs.count(letter) == 1)
        output = ("..." if "..." in inputs else "") + "".join(once)
    ranks = [
        len(shape) - len(term.replace("...", "")) for term, shape in zip(terms, shapes, strict=True) if "..." in term
    ]
    longest = max(ranks, default=0)
    expanded = []
    for term, shape in zip(terms, shapes, strict=True):
        rank = len(shape) - len(term.replace("...", ""))
        letters = _letters(term, longest, rank if "..." in term else 0)
        if len(letters) != len(shape) or len(set(letters)) != len(letters):
            return None
        expanded.append(letters)
    return expanded, _letters(output, longest, longest)


def _letters(term: str, longest: int, rank: int) -> list[str]:
    before, dots, after = term.partition("...")
    middle = [f"...{number}" for number in range(longest - rank, longest)] if dots else []
    return [*before, *middle, *after]


def contracted(contraction: Contraction) -> Dimension:
    """Returns the axes that both operands have and the result has not."""
    right, kept = set(flat(contraction.right.dims)), set(flat(contraction.dims))
    return tuple(axis for axis in flat(contraction.left.dims) if axis in right and axis not in kept)
