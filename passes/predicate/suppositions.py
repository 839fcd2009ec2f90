"""What is supposed of masks from outside, where only then they are masks: that they hold 0 and 1 alone.

`(1 - mask) * -10000` hides keys from queries if the mask is 0 or 1 everywhere, and is a bias if it is not.  Nothing in
a graph tells which; so the graph is made to check it, and the rewrite is right whenever the check lets it run.
"""

from collections.abc import Callable

import torch
from sympy.core.function import AppliedUndef
from torch import fx

from nsa_compile.passes.metadata import tensor_of
from nsa_compile.passes.predicate.causes import is_learned
from nsa_compile.passes.predicate.graph_builder import GraphBuilder
from nsa_compile.passes.predicate.interval import Interval
from nsa_compile.passes.predicate.tensor import Leaf
from nsa_compile.passes.predicate.terms import expressions


def doubted(leaves: tuple[Leaf, ...], leaf: Callable[[str], Leaf]) -> frozenset[str]:
    """Names the data from outside that would have to be 0 and 1 for a bias to be a mask.

    Args:
        leaves: the data in the bias.
        leaf: finds a leaf by its name.

    Returns:
        The names; none where the bias is made of anything else, or is learned: that is no padding.
    """
    names: set[str] = set()
    pending, seen = list(leaves), set[str]()
    while pending:
        current = pending.pop()
        if current.name in seen:
            continue
        seen.add(current.name)
        if current.computed_of:
            pending += map(leaf, current.computed_of)
        elif _may_be_padding(current):
            names.add(current.name)
        else:
            return frozenset()
    return frozenset(names)


def _may_be_padding(leaf: Leaf) -> bool:
    tensor = tensor_of(leaf.node)
    is_outside = leaf.written_by.op in ("placeholder", "get_attr") and not leaf.stale
    # A gradient would be lost, which padding has no use for.
    is_fixed = not is_learned(leaf.node) and tensor is not None and not tensor.requires_grad
    return is_outside and is_fixed and bool(leaf.shape) and leaf.dtype != torch.bool and not leaf.dtype.is_complex


def are_padding(names: frozenset[str], interval: Interval) -> bool:
    """Whether all of some data hides keys or queries; what hides none has no reason to be 0 or 1."""
    parts = (part for condition in (*interval.keys, *interval.queries) for part in expressions(condition))
    return names <= {application.func.__name__ for part in parts for application in part.atoms(AppliedUndef)}


def require_binary(leaf: Leaf, builder: GraphBuilder, read: Callable[[Leaf], fx.Node], attention: str) -> fx.Node:
    """Adds a node that raises an error, when the graph runs, unless data holds 0 and 1 alone (NaN is neither).

    Returns:
        A bool of rank 0, true where there is no error; what supposes so has to read it.
    """
    return builder.require_binary(
        read(leaf),
        f"nsa_compile has put NSA in the place of {attention}, whose mask {leaf.name} is padding only if it holds "
        f"0 and 1 alone; now it holds something else. Pass 0 and 1, or a bool mask, or leave this model dense.",
    )
