"""Sites that are written out: softmax(scale · Q Kᵀ + masks) V, in any spelling that reads so.

The softmax is the anchor.  From it the scores are read backwards to the product of queries and keys, and the
probabilities are followed forwards to the product with the values.  Shapes are followed as products of axes, so that
heads may come first or second, be flattened into the batch or split into groups; einsum and matmul are the same.
"""

from torch import fx

from nsa_compile.passes.assemble import assemble
from nsa_compile.passes.axes import Axis, Dimension, dimensions, flat, leaves
from nsa_compile.passes.calls import arguments, operation
from nsa_compile.passes.contractions import contracted, is_contraction, is_weight, read_contraction
from nsa_compile.passes.handmade import Softmax, read_handmade
from nsa_compile.passes.layout import LabelledTensor
from nsa_compile.passes.metadata import dtype_of, place_of, same_shape, shape_of
from nsa_compile.passes.parts import Parts, Problem
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.probabilities import Weighting, follow_probabilities, is_redundant
from nsa_compile.passes.repetition import sources
from nsa_compile.passes.scores import ScoreReader, Scores
from nsa_compile.passes.sites import AttentionSite, MaskKind, Reason, Rejection, Scope

SPELLING = "softmax(Q Kᵀ) V"
# Operations between a product and a softmax, or between a softmax and a product, within this many steps make an
# attention of a softmax that cannot be read.
_REACH = 12


def is_softmax(node: fx.Node) -> bool:
    """Tells whether a node takes a softmax."""
    return operation(node) == "softmax"


def read_softmax(node: fx.Node, scope: Scope, writes: Writes) -> AttentionSite | Rejection | None:
    """Reads the attention around a softmax.

    Args:
        node: a node for which `is_softmax` holds.
        scope: the graph that holds it.
        writes: the in-place writes of that graph.

    Returns:
        The site, its masks unproved; why it cannot be one; None where the softmax is no attention's.
    """
    bound = arguments(node) or {}
    scores, dim = bound.get("input"), bound.get("dim")
    shape = shape_of(scores)
    if not isinstance(scores, fx.Node) or shape is None or not isinstance(dim, int):
        return None
    dims = dimensions(shape)
    return _site(Softmax(node, scores, node, dims, dim % len(dims)), scope, writes)


def read_exponential(node: fx.Node, scope: Scope, writes: Writes) -> AttentionSite | Rejection | None:
    """Reads the attention around a softmax that is made by hand; None where powers are not divided by their sum.

    Args:
        node: a node for which `is_exponential` holds.
        scope: the graph that holds it.
        writes: the in-place writes of that graph.
    """
    softmax = read_handmade(node, writes)
    return None if softmax is None else _site(softmax, scope, writes)


def _site(softmax: Softmax, scope: Scope, writes: Writes) -> AttentionSite | Rejection | None:
    if not _is_between_products(softmax.node):
        return None
    parts = _read(softmax, writes)
    if isinstance(parts, Problem):
        place = place_of(softmax.node, scope, SPELLING)
        return Rejection(parts.reason, parts.sentence, parts.nodes or (softmax.node,), place)
    return assemble(parts, place_of(parts.output.node, scope, SPELLING), writes)


def _read(softmax: Softmax, writes: Writes) -> Parts | Problem:
    if not softmax.keys:
        return Problem(Reason.UNSUPPORTED_SHAPE, "There is a single key.")
    weighting = follow_probabilities(softmax, writes)
    # Read the scores even if the probabilities cannot be followed: what is wrong with them says more.
    site = weighting.output.node if isinstance(weighting, Weighting) else softmax.node
    reader = ScoreReader(softmax.keys, writes, site)
    scores = reader.read(softmax.scores, softmax.dims, softmax.reader, softmax.scale)
    if isinstance(scores, Problem):
        return scores
    if isinstance(weighting, Problem):
        return weighting
    for mask, kind in weighting.refills:
        if not is_redundant((mask, kind), scores, softmax, writes):
            done = "multiplied by" if kind is MaskKind.WEIGHT else "set to 0 where it says"
            sentence = f"Probabilities are {done} {mask}, which is no mask of the scores."
            return Problem(Reason.PROBABILITIES_CHANGED, sentence, (mask,))
    return _parts(scores, weighting, softmax, writes)


def _parts(scores: Scores, weighting: Weighting, softmax: Softmax, writes: Writes) -> Parts | Problem:
    key_axes = set(leaves(softmax.keys))
    product, output = scores.contraction, weighting.output
    sides = [(product.left, product.right), (product.right, product.left)]
    found = [(query, key) for query, key in sides if key_axes <= key.axes and key_axes.isdisjoint(query.axes)]
    if len(found) != 1:
        return Problem(Reason.UNKNOWN_SPELLING, f"The softmax of {product.node} is not over keys.", (product.node,))
    (query, key), value = found[0], weighting.value
    depth = contracted(product)
    place = writes.position
    read = [(each.node, product.node) for each in (query, key, *(factor.tensor for factor in scores.factors))]
    read += [(value.node, weighting.product.node), *((each.tensor.node, softmax.node) for each in weighting.masks)]
    for operand, reader in read:
        if any(True for _ in writes.between(operand, place(reader), place(output.node))):
            sentence = f"{operand} is written in place before the attention's result is there."
            return Problem(Reason.UNKNOWN_SPELLING, sentence, (operand,))
    masks = (*scores.masks, *weighting.masks)
    only_queries = [axis for axis in flat(query.dims) if axis not in {*depth, *key.axes, *value.axes}]
    masked = set().union(*(sources(mask.tensor, output.node, writes)[-1].axes for mask in masks))
    rows = _rows(scores, query, softmax)
    return Parts(
        query=query,
        key=key,
        value=value,
        output=output,
        length=_length(only_queries, [axis for axis in only_queries if axis in masked], rows),
        keys=softmax.keys,
        depth=depth,
        value_depth=tuple(axis for axis in flat(weighting.product.dims) if axis not in flat(softmax.dims)),
        masks=masks,
        scale=scores.scale,
        symbolic_scales=scores.symbolic_scales,
        factors=scores.factors,
        is_autocast=any(map(_casts_operands, (product.node, weighting.product.node))),
    )


def _casts_operands(product: fx.Node) -> bool:
    """Whether a product has another dtype than its operands, as under autocast."""
    read = read_contraction(product)
    return read is not None and any(dtype_of(operand.node) != dtype_of(product) for operand in (read.left, read.right))


def _rows(scores: Scores, query: LabelledTensor, softmax: Softmax) -> Dimension:
    """The axes that stand where query positions usually stand: rows of the product, or the dimension before keys."""
    product = scores.contraction
    if operation(product.node) == "einsum":
        return softmax.dims[softmax.dim - 1] if softmax.dim else ()
    return query.dims[-2] if query is product.left else query.dims[-1]


def _length(only_queries: list[Axis], masked: list[Axis], rows: Dimension) -> Dimension:
    """Tells query positions from heads that share a key: masks differ between positions, not between heads."""
    if len(masked) == 1:
        return tuple(masked)
    in_rows = [axis for axis in leaves(rows) if axis in only_queries]
    return tuple(in_rows)


def _is_between_products(softmax: fx.Node) -> bool:
    """Whether a softmax stands between two products of activations, so that it is an attention's, however spelled."""
    return _reaches_product(softmax, forwards=False) and _reaches_product(softmax, forwards=True)


def _reaches_product(softmax: fx.Node, forwards: bool) -> bool:
    level, seen = [softmax], {softmax}
    for _ in range(_REACH):
        following = []
        for node in level:
            for each in node.users if forwards else node.all_input_nodes:
                if each in seen:
                    continue
                seen.add(each)
                if is_contraction(each):
                    if forwards or not any(map(is_weight, each.all_input_nodes)):
                        return True
                    if _mixes_heads(each):
                        following.append(each)
                elif _is_passed(each):
                    following.append(each)
        level = following
    return False


def _mixes_heads(product: fx.Node) -> bool:
    """Whether a product with a weight makes scores of scores: `[…, T, S]` of one with as many dimensions."""
    shape = shape_of(product)
    return (
        shape is not None
        and len(shape) >= 4
        and any(same_shape(shape, shape_of(read) or ()) for read in product.all_input_nodes)
    )


def _is_passed(node: fx.Node) -> bool:
    """Whether a node may stand between a product and a softmax: no projection, normalization or other softmax."""
    return operation(node) not in _ENDS


_ENDS = frozenset(
    (
        "placeholder",
        "get_attr",
        "output",
        "call_module",
        "softmax",
        "linear",
        "embedding",
        "layer_norm",
        "rms_norm",
        "group_norm",
        "conv1d",
        "conv2d",
        "addmm",
        "topk",
    )
)
