"""Sites that are calls of `flex_attention`, whose score_mod and mask_mod are graphs over single positions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator

from nsa_compile.passes.assemble import assemble
from nsa_compile.passes.block_lists import BlockLists, Coverage, read_block_lists
from nsa_compile.passes.calls import operation
from nsa_compile.passes.metadata import dtype_of, number_of, place_of, shape_of
from nsa_compile.passes.parts import Parts, Problem
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.scopes import attribute_of
from nsa_compile.passes.scores import ScoreReader, Scores
from nsa_compile.passes.sdpa import read_operands
from nsa_compile.passes.sites import AttentionSite, Mask, MaskKind, Place, Predicate, Reason, Rejection, Scope

SPELLING = "flex_attention"


def is_flex_call(node: fx.Node) -> bool:
    """Tells whether a node is the higher-order operator that a call of `flex_attention` becomes."""
    return isinstance(node.target, HigherOrderOperator) and operation(node) == "flex_attention"


def read_flex_call(node: fx.Node, scope: Scope, writes: Writes) -> AttentionSite | Rejection | None:
    """Reads one call; None where its output is not used.

    Args:
        node: a node for which `is_flex_call` holds.
        scope: the graph that holds it.
        writes: the in-place writes of that graph.

    Returns:
        The site, its masks unproved; or why the call cannot be one.
    """
    used = {user.args[1]: user for user in node.users if operation(user) == "getitem" and user.users}
    if 0 not in used:
        return None
    place = place_of(used[0], scope, SPELLING)
    read = _Reader(node, scope, writes, place).read(used[0], [each for item, each in used.items() if item != 0])
    return Rejection(read.reason, read.sentence, read.nodes or (node,), place) if isinstance(read, Problem) else read


class _Reader:
    def __init__(self, call: fx.Node, scope: Scope, writes: Writes, place: Place) -> None:
        self._call = call
        self._scope = scope
        self._writes = writes
        self._place = place

    def read(self, output: fx.Node, statistics: list[fx.Node]) -> AttentionSite | Rejection | Problem:
        if statistics:
            sentence = f"{statistics[0]}, beside the output, is used."
            return Problem(Reason.LOG_SUM_EXP_USED, sentence, tuple(statistics))
        if len(self._call.args) != 9 or self._call.kwargs:
            return Problem(Reason.UNSUPPORTED_CALL, f"{SPELLING} is called in a way that is not known.")
        query, key, value, score_mod, blocks, scale, _, score_data, mask_data = self._call.args
        operands = [operand for operand in (query, key, value) if isinstance(operand, fx.Node)]
        shapes = [shape for operand in operands if (shape := shape_of(operand)) is not None]
        lists = BlockLists.of(blocks)
        mask_body = self._body(lists.predicate, mask_data, inputs=4) if lists else None
        score_body = self._body(score_mod, score_data, inputs=5)
        if len(shapes) < 3:
            return Problem(Reason.UNKNOWN_SHAPES, "No shape is recorded for query, key or value.")
        if lists is None or mask_body is None or score_body is None:
            return Problem(Reason.UNSUPPORTED_CALL, "score_mod, mask_mod or the block mask cannot be read.")
        coverage = read_block_lists(lists, self._call, self._scope, self._writes)
        if isinstance(coverage, Problem):
            return coverage
        scores = self._scores(score_body)
        if isinstance(scores, Problem):
            return scores
        parts = read_operands(output, operands, shapes, None, enable_gqa=True)
        if isinstance(parts, str):
            return Problem(Reason.UNSUPPORTED_SHAPE, parts)
        number = number_of(scale)
        symbolic = ((scale, 1),) if isinstance(scale, fx.Node) and number is None else ()
        read = Parts(
            **parts,
            scale=scores.scale * (1.0 if number is None else number),
            symbolic_scales=(*symbolic, *scores.symbolic_scales),
            is_autocast=any(dtype_of(each) != dtype_of(output) for each in operands),
        )
        site = assemble(read, self._place, self._writes)
        if isinstance(site, Rejection):
            return site
        return dataclasses.replace(site, masks=_masks(mask_body, score_body, scores, coverage))

    def _body(self, reference: Any, data: Any, inputs: int) -> Scope | None:
        """The graph of a modification; its further placeholders are captured tensors."""
        target = str(reference.target) if isinstance(reference, fx.Node) and reference.op == "get_attr" else ""
        body = attribute_of(self._scope.graph_module, target) if target else None
        if not isinstance(body, fx.GraphModule) or not isinstance(data, Sequence):
            return None
        placeholders = body.graph.find_nodes(op="placeholder")
        if len(placeholders) != inputs + len(data):
            return None
        path = f"{self._scope.path}.{target}" if self._scope.path else target
        arguments = dict(zip(placeholders[inputs:], data, strict=True))
        return Scope(body, path, self._scope, (self._call,), arguments)

    def _scores(self, body: Scope) -> Scores | Problem:
        """Reads score_mod as a scale and masks, back from its result to the score."""
        graph = body.graph_module.graph
        score, output = graph.find_nodes(op="placeholder")[0], graph.output_node()
        (result,) = output.all_input_nodes
        read = ScoreReader((), Writes(graph), output, product=score).read(result, (), output)
        if isinstance(read, Scores) and read.factors:
            node = read.factors[0].tensor.node
            return Problem(Reason.MULTIPLIED_SCORES, f"score_mod multiplies by {node}.", (node,))
        return read


def _masks(mask_body: Scope, score_body: Scope, scores: Scores, coverage: Coverage) -> tuple[Mask, ...]:
    places = mask_body.graph_module.graph.find_nodes(op="placeholder")
    score, *score_places = score_body.graph_module.graph.find_nodes(op="placeholder")
    (result,) = mask_body.graph_module.graph.output_node().all_input_nodes
    visited = Predicate(mask_body, tuple(places[:4]), blocks=coverage.mask)
    scored = Predicate(score_body, tuple(score_places[:4]), score)
    added = (Mask(each.tensor.node, each.kind, factor=each.factor, predicate=scored) for each in scores.masks)
    return (Mask(result, MaskKind.ALLOWED, predicate=visited), *added)
