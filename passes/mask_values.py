"""What an element of a mask is, in terms of batch b, head h, query i and key j."""

import functools

import sympy
from torch import fx

from nsa_compile.passes.predicate.cases import Value, formula_of, substitute_value
from nsa_compile.passes.predicate.facts import decide
from nsa_compile.passes.predicate.formula import map_atoms
from nsa_compile.passes.predicate.interpreter import Interpreter
from nsa_compile.passes.predicate.interval import Sizes
from nsa_compile.passes.predicate.tensor import B_INDEX, H_INDEX, KEY, QUERY, ZERO, axis
from nsa_compile.passes.predicate.terms import UnknownError
from nsa_compile.passes.sites import Mask, MaskKind, Predicate, Scope

_POSITIONS = (B_INDEX, H_INDEX, QUERY, KEY)


class MaskValues:
    """Evaluates masks: tensors, and predicates over single positions."""

    def __init__(self, interpreter: Interpreter) -> None:
        self._interpreter = interpreter

    def value(self, mask: Mask, sizes: Sizes, scope: Scope, reader: fx.Node) -> Value:
        """The mask's element.

        Args:
            mask: the mask.
            sizes: of the attention.
            scope: the graph that holds the attention.
            reader: the node that reads the mask.

        Raises:
            UnknownError: it is no mask of single positions.
        """
        if mask.predicate is not None:
            return self._predicate(mask.node, mask.predicate, sizes)
        tensor = self._interpreter.evaluate(mask.node, scope, reader)
        places = [(k,) for k in range(4 - tensor.rank, 4)] if mask.axes is None else mask.axes
        return substitute_value(tensor.value, {axis(k): _merged(sizes, place) for k, place in enumerate(places)})

    def is_of_its_blocks(self, mask: Mask, sizes: Sizes, scope: Scope, reader: fx.Node) -> bool:
        """Whether the blocks that a predicate is asked about are those in which it allows a key."""
        if mask.predicate is None or mask.predicate.blocks is None:
            return True
        blocks = Mask(mask.predicate.blocks, MaskKind.ALLOWED)
        formulas = (formula_of(self.value(each, sizes, scope, reader)) for each in (mask, blocks))
        allowed, visited = (map_atoms(each, functools.partial(decide, ranges=sizes.ranges)) for each in formulas)
        return allowed == visited

    def _predicate(self, node: fx.Node, predicate: Predicate, sizes: Sizes) -> Value:
        for place, symbol in zip(predicate.positions, _POSITIONS, strict=True):
            self._interpreter.assume(place, predicate.scope, symbol)
        if predicate.score is not None:
            self._interpreter.depend(predicate.score, _POSITIONS)
        output = predicate.scope.graph_module.graph.output_node()
        tensor = self._interpreter.evaluate(node, predicate.scope, output)
        if tensor.rank:
            raise UnknownError("it is no single element")
        return substitute_value(tensor.value, dict(zip(_POSITIONS, _index(sizes), strict=True)))


def _merged(sizes: Sizes, places: tuple[int, ...]) -> sympy.Expr:
    """The index along a dimension that is the product of some of B, H, T and S."""
    lengths = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    merged: sympy.Expr = ZERO
    for place in places:
        merged = merged * lengths[place] + _index(sizes)[place]
    return merged


def _index(sizes: Sizes) -> tuple[sympy.Expr, ...]:
    """The index along B, H, T and S; 0 along dimensions of size 1."""
    lengths = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    return tuple(ZERO if length == 1 else symbol for length, symbol in zip(lengths, _POSITIONS, strict=True))
