"""Writes an interval's ends and the padding vector back into a graph, as few small nodes before an attention.

What is written is linear in the length: `[B|1, T]` for the ends, `[B, S]` for the padding; never `[T, S]`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from nsa_compile.passes.predicate.graph_builder import GraphBuilder
from nsa_compile.passes.predicate.interval import Bound, Interval, Limit, Sizes
from nsa_compile.passes.predicate.positions import Positions
from nsa_compile.passes.predicate.tensor import B_INDEX, KEY, QUERY, Leaf, size_expression
from nsa_compile.passes.predicate.terms import And, expressions


@dataclasses.dataclass(frozen=True)
class EmittedInterval:
    """The visible keys as nodes of one graph.

    Attributes:
        first_key: `[B|1, T]` int32, or None for 0.
        last_key: `[B|1, T]` int32, or None for the query's own place (`is_causal`) or S − 1.
        key_valid: `[B|1, S]` bool, or None where every key is valid.
        is_causal: whether a missing `last_key` means the query's own place.
    """

    first_key: fx.Node | None
    last_key: fx.Node | None
    key_valid: fx.Node | None
    is_causal: bool


def is_plain_causal(interval: Interval) -> bool:
    """Whether the last key of each query is its own place, aligned top-left, as torch's `is_causal` has it."""
    return interval.last == (Limit(QUERY),) and not interval.queries


def sizes_needed(interval: Interval, sizes: Sizes) -> set[sympy.Expr]:
    """The sizes that computing an interval takes, beside numbers."""
    needed = {sizes.batch, sizes.queries, sizes.keys} if not _is_empty(interval) else set()
    pending: list[sympy.Basic] = []
    for bound in (*interval.first, *interval.last) if not is_plain_causal(interval) else interval.first:
        pending += [bound.position] if isinstance(bound, Limit) else [bound.values, bound.target]
    for formula in (*interval.keys, *interval.queries):
        pending += expressions(formula)
    while pending:
        part = pending.pop()
        if not isinstance(part, sympy.Expr) or part.is_number:
            continue
        if not part.atoms(AppliedUndef) and not part.free_symbols & {B_INDEX, QUERY, KEY}:
            needed.add(part)
        elif isinstance(part, sympy.Add):
            pending += [sympy.Add(*(t for t in part.args if not _varies(t))), *(t for t in part.args if _varies(t))]
        elif isinstance(part, sympy.floor):
            pending += sympy.fraction(sympy.together(part.args[0]))
        else:
            pending += part.args
    return needed


def _varies(term: sympy.Expr) -> bool:
    return bool(term.atoms(AppliedUndef) or term.free_symbols & {B_INDEX, QUERY, KEY})


def _is_empty(interval: Interval) -> bool:
    return not (interval.first or interval.last or interval.keys or interval.queries)


def emit(
    interval: Interval,
    sizes: Sizes,
    builder: GraphBuilder,
    read: Callable[[Leaf], fx.Node],
    leaf: Callable[[str], Leaf],
    required: Sequence[fx.Node] = (),
) -> EmittedInterval:
    """Adds the nodes that compute an interval.

    Args:
        interval: what to compute.
        sizes: of the attention.
        builder: where to add nodes.
        read: gives a node that holds a leaf's values at the place where nodes are added.
        leaf: finds a leaf by its function's name.
        required: bools of rank 0 that are true wherever the interval is right; the padding vector is made of them too,
            so that the attention reads them.
    """
    over_queries = Positions(builder, sizes, QUERY, read, leaf)
    over_keys = Positions(builder, sizes, KEY, read, leaf)

    def bound_node(bound: Bound, is_last: bool) -> fx.Node:
        if isinstance(bound, Limit):
            return over_queries.whole(over_queries.expression(bound.position))
        values = over_keys.whole(over_keys.expression(bound.values))
        target = over_queries.whole(over_queries.expression(bound.target))
        return _look_up(builder, values, target, sizes, is_last)

    first = [bound_node(bound, False) for bound in interval.first]
    plain = is_plain_causal(interval)
    last = [] if plain else [bound_node(bound, True) for bound in interval.last]
    first_key = _int32(builder, _fold(builder, "maximum", first))
    last_key = _int32(builder, _fold(builder, "minimum", last))
    if interval.queries:
        seeing = over_queries.formula(And(interval.queries))
        if last_key is None:
            last_key = over_queries.whole(over_queries.size(sizes.keys - 1))
        last_key = builder.call("where", seeing, last_key, builder.scalar(-1, torch.int32))
    key_valid = over_keys.whole(over_keys.formula(And(interval.keys)), batch=True) if interval.keys else None
    for condition in required:
        if key_valid is None:
            key_valid = builder.contiguous(builder.expand(condition, sympy.Integer(1), sizes.keys))
        else:
            key_valid = builder.call("logical_and", key_valid, condition)
    return EmittedInterval(first_key, last_key, key_valid, plain)


def _fold(builder: GraphBuilder, name: str, nodes: list[fx.Node]) -> fx.Node | None:
    result = None
    for node in nodes:
        result = node if result is None else builder.call(name, result, node)
    return result


def _int32(builder: GraphBuilder, node: fx.Node | None) -> fx.Node | None:
    return None if node is None else builder.convert(node, torch.int32)


def _look_up(builder: GraphBuilder, values: fx.Node, target: fx.Node, sizes: Sizes, is_last: bool) -> fx.Node:
    """The first place `[B|1, T]` in sorted `values` `[B|1, S]` that is ≥ `target` `[B|1, T]`, or the last that is ≤."""
    rows = [size_expression(builder.value(node).shape[0]) for node in (values, target)]
    batch = sympy.Integer(1) if rows == [1, 1] else sizes.batch
    values = builder.expand(builder.convert(values, torch.int64), batch, sizes.keys)
    target = builder.expand(builder.convert(target, torch.int64), batch, sizes.queries)
    place = builder.call(
        "searchsorted", builder.contiguous(values), builder.contiguous(target), out_int32=True, right=is_last
    )
    return builder.call("add", place, -1) if is_last else place
