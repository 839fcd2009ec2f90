"""Scores that are the sum of two products: keys in two parts, as of absorbed latents, or a bias by position."""

from collections.abc import Sequence

from torch import fx

from nsa_compile.passes.axes import Dimension, leaves
from nsa_compile.passes.contractions import Contraction
from nsa_compile.passes.metadata import is_parameter, tensor_of
from nsa_compile.passes.parts import Problem
from nsa_compile.passes.sites import Reason


class TwoProducts(Problem):
    """Scores were found, and they are two products."""


def two_products(node: fx.Node, products: Sequence[Contraction | None], keys: Dimension) -> TwoProducts:
    """Says why a sum of two products is not read as scores.

    Args:
        node: the sum.
        products: its parts; None for one that was not read.
        keys: the axes over which the softmax is taken.
    """
    axes = set(leaves(keys))
    sides = [side for product in products if product is not None for side in (product.left, product.right)]
    with_keys = [side for side in sides if not axes.isdisjoint(side.axes)]
    # Keys are of a batch, and of the model's input; positions are of neither.
    if with_keys and all(len(side.dims) > 2 and _is_of_inputs(side.node) for side in with_keys):
        names = " and ".join(str(product.node) for product in products if product is not None)
        sentence = f"{node} adds products of queries and keys, {names}; scores are read as a single one."
        return TwoProducts(Reason.UNKNOWN_SPELLING, sentence, (node,))
    sentence = f"{node} joins two products: a position-dependent bias is part of the scores."
    return TwoProducts(Reason.LEARNED_BIAS, sentence, (node,))


def vagueness(problem: Problem) -> int:
    """Ranks what is told of an operand that may be the scores: that it is them is known only where products were."""
    if isinstance(problem, TwoProducts):
        return 0
    return 2 if problem.reason is Reason.UNKNOWN_SPELLING else 1


def _is_of_inputs(node: fx.Node) -> bool:
    """Whether a tensor is computed of tensors that the graph is given, beside parameters and buffers."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.op == "placeholder" and not is_parameter(current):
            return True
        # A size says nothing of what a tensor holds.
        made_of = {each for each in current.all_input_nodes if tensor_of(each) is not None} - seen
        seen |= made_of
        pending += made_of
    return False
