"""Computes expressions and formulas over batch and one position as small tensors in a graph."""

from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from nsa_compile.passes.metadata import tensor_of
from nsa_compile.passes.predicate.graph_builder import GraphBuilder
from nsa_compile.passes.predicate.interval import Sizes
from nsa_compile.passes.predicate.tensor import B_INDEX, QUERY, Leaf, size_expression
from nsa_compile.passes.predicate.terms import And, Atom, Cast, Formula, Not, Or, Relation, arguments_of

# A size, or a tensor node `[B|1, N|1]`.
Operand = int | float | fx.Node


class Positions:
    """Computes expressions over batch and one position (queries or keys) as tensors `[B|1, N|1]`."""

    def __init__(
        self,
        builder: GraphBuilder,
        sizes: Sizes,
        position: sympy.Symbol,
        read: Callable[[Leaf], fx.Node],
        leaf: Callable[[str], Leaf],
    ) -> None:
        self._builder = builder
        self._sizes = sizes
        self._position = position
        self._length = sizes.queries if position == QUERY else sizes.keys
        self._read = read
        self._leaf = leaf

    def size(self, expression: sympy.Expr) -> Operand:
        """A number, or a node that holds a size."""
        return self._builder.size(expression)

    def whole(self, operand: Operand, batch: bool = False) -> fx.Node:
        """The operand as a tensor `[B|1, N]`, or `[B, N]`."""
        builder = self._builder
        if not isinstance(operand, fx.Node) or tensor_of(operand) is None:
            shape = [builder.size(self._sizes.batch) if batch else 1, builder.size(self._length)]
            return builder.call("full", shape, operand, dtype=torch.int32, device=builder.device)
        rows = self._sizes.batch if batch else size_expression(builder.value(operand).shape[0])
        return builder.expand(operand, rows, self._length)

    def expression(self, expression: sympy.Expr) -> Operand:
        """Computes an integer (or converted data) expression."""
        if not expression.free_symbols & {B_INDEX, self._position} and not expression.atoms(AppliedUndef):
            return self._builder.size(expression)
        builder = self._builder
        if isinstance(expression, sympy.Add):
            return self._sum(expression)
        if isinstance(expression, sympy.Symbol):
            return self._arange(expression, sympy.Integer(0))
        if isinstance(expression, AppliedUndef):
            data = self._data(expression)
            return builder.convert(data, torch.int32) if builder.value(data).dtype == torch.bool else data
        if isinstance(expression, Cast):
            inner = self.tensor(arguments_of(expression)[0])
            return builder.convert(inner, getattr(torch, str(expression.args[1])))
        if isinstance(expression, sympy.floor):
            numerator, denominator = sympy.fraction(sympy.together(arguments_of(expression)[0]))
            return builder.call("floor_divide", self.tensor(numerator), self.expression(denominator))
        if isinstance(expression, sympy.Mod):
            dividend, divisor = arguments_of(expression)
            return builder.call("remainder", self.tensor(dividend), self.expression(divisor))
        if isinstance(expression, sympy.Abs):
            return builder.call("abs", self.tensor(arguments_of(expression)[0]))
        if isinstance(expression, (sympy.Max, sympy.Min)):
            return self._extreme(expression)
        if isinstance(expression, sympy.Mul):
            operands = [self.expression(factor) for factor in arguments_of(expression)]
            operands.sort(key=lambda operand: not _is_tensor(operand))
            result = operands[0]
            for operand in operands[1:]:
                result = builder.call("mul", result, operand)
            return result
        raise NotImplementedError(f"no way to compute {expression}")

    def _arange(self, symbol: sympy.Symbol, offset: sympy.Expr) -> fx.Node:
        builder = self._builder
        is_batch = symbol == B_INDEX
        length = self._sizes.batch if is_batch else self._length
        start, end = builder.size(offset), builder.size(offset + length)
        places = builder.call("arange", start, end, dtype=torch.int32, device=builder.device)
        return builder.call("unsqueeze", places, 1 if is_batch else 0)

    def _sum(self, expression: sympy.Expr) -> Operand:
        """Adds terms: one arange for position and sizes, then data."""
        builder = self._builder
        terms = sympy.Add.make_args(expression)
        plain = [t for t in terms if not t.free_symbols & {B_INDEX, self._position} and not t.atoms(AppliedUndef)]
        constant = sympy.Add(*plain)
        result: Operand | None = None
        rest = [term for term in terms if term not in plain]
        if self._position in rest:
            rest.remove(self._position)
            result, constant = self._arange(self._position, constant), sympy.Integer(0)
        for term in sorted(rest, key=lambda t: t.could_extract_minus_sign()):
            if result is None:
                result = self.expression(term)
            else:
                negative = term.could_extract_minus_sign()
                addend = self.expression(-term if negative else term)
                result = builder.call("sub" if negative else "add", result, addend)
        if constant != 0:
            result = builder.call("add", result, builder.size(constant))
        assert result is not None  # noqa: S101  (a sum has terms)
        return result

    def _extreme(self, expression: sympy.Expr) -> Operand:
        builder = self._builder
        operands = sorted(map(self.expression, arguments_of(expression)), key=lambda operand: not _is_tensor(operand))
        result = operands[0]
        is_maximum = isinstance(expression, sympy.Max)
        for operand in operands[1:]:
            if _is_tensor(operand):
                result = builder.call("maximum" if is_maximum else "minimum", result, operand)
            else:
                result = builder.call("clamp", result, *((operand, None) if is_maximum else (None, operand)))
        return result

    def _data(self, application: sympy.Expr) -> fx.Node:
        """A leaf's values at an index, as `[B|1, N|1]`."""
        leaf = self._leaf(application.func.__name__)
        node = self._read(leaf)
        index = arguments_of(application)
        view = self._view(node, leaf, index)
        return self._gather(node, leaf, index) if view is None else view

    def _view(self, node: fx.Node, leaf: Leaf, index: tuple[sympy.Expr, ...]) -> fx.Node | None:
        """The leaf's values by views alone, where the index is batch, position and constants."""
        builder, sizes = self._builder, self._sizes
        kept: list[sympy.Symbol] = []
        steps: list[tuple[Any, ...]] = []
        for dim, (place, size) in enumerate(zip(index, leaf.shape, strict=True)):
            offset: sympy.Expr = sympy.expand(place - self._position)
            if place == B_INDEX and size == sizes.batch and B_INDEX not in kept:
                kept.append(B_INDEX)
            elif not offset.free_symbols & {B_INDEX, self._position} and not offset.atoms(AppliedUndef):
                fits = offset.is_nonnegative and (size - offset - self._length).is_nonnegative
                if not fits or self._position in kept:
                    return None
                kept.append(self._position)
                if offset != 0 or size != self._length:
                    steps.append(("narrow", dim, builder.size(sympy.sympify(offset)), builder.size(self._length)))
            elif not place.free_symbols & {B_INDEX, self._position} and not place.atoms(AppliedUndef):
                steps.append(("select", dim, builder.size(place)))
            else:
                return None
        for name, dim, *arguments in sorted(steps, key=lambda step: -step[1]):
            node = builder.call(name, node, dim, *arguments)
        if kept == [self._position, B_INDEX]:
            node = builder.call("transpose", node, 0, 1)
        if B_INDEX not in kept:
            node = builder.call("unsqueeze", node, 0)
        if self._position not in kept:
            node = builder.call("unsqueeze", node, 1)
        return node

    def _gather(self, node: fx.Node, leaf: Leaf, index: tuple[sympy.Expr, ...]) -> fx.Node:
        """The leaf's values by indexing; places outside the tensor, which conditions exclude, read its edge."""
        builder = self._builder
        places = []
        for place, size in zip(index, leaf.shape, strict=True):
            computed = self.expression(place)
            if not _is_tensor(computed):
                computed = self.whole(computed)
            inside = builder.call("clamp", computed, 0, builder.size(size - 1))
            places.append(builder.convert(inside, torch.int64))
        return builder.index(node, places)

    def formula(self, formula: Formula) -> fx.Node:
        """Computes a formula as a bool tensor `[B|1, N|1]`."""
        builder = self._builder
        if isinstance(formula, (And, Or)):
            nodes = [self.formula(operand) for operand in formula.operands]
            result = nodes[0]
            for node in nodes[1:]:
                result = builder.call("logical_and" if isinstance(formula, And) else "logical_or", result, node)
            return result
        negated = isinstance(formula, Not)
        atom = formula.operand if isinstance(formula, Not) else formula
        return self._atom(atom, negated)

    def _atom(self, atom: Atom, negated: bool) -> fx.Node:
        builder = self._builder
        constant, rest = atom.expression.as_coeff_Add()
        flipped = rest.could_extract_minus_sign()
        limit = constant if flipped else -constant
        rest = -rest if flipped else rest
        if atom.relation is Relation.EQUAL:
            if isinstance(rest, AppliedUndef) and self._leaf(rest.func.__name__).dtype == torch.bool and limit == 0:
                truth = self._data(rest)
                return truth if negated else builder.call("logical_not", truth)
            return builder.call("ne" if negated else "eq", self.tensor(rest), _number(limit))
        below = atom.relation is Relation.BELOW
        name = ("gt" if below else "ge") if flipped else ("lt" if below else "le")
        compared = builder.call(name, self.tensor(rest), _number(limit))
        return builder.call("logical_not", compared) if negated else compared

    def tensor(self, expression: sympy.Expr) -> fx.Node:
        """Computes an expression as a tensor, even where it is a number or a size."""
        computed = self.expression(expression)
        return computed if isinstance(computed, fx.Node) and _is_tensor(computed) else self.whole(computed)


def _is_tensor(operand: Operand) -> bool:
    return isinstance(operand, fx.Node) and tensor_of(operand) is not None


def _number(constant: sympy.Expr) -> int | float:
    return int(constant) if constant.is_integer else float(constant)
