"""Proves which keys each query of an attention may see, or says what stopped the proof.

A mask is a graph of ordinary operations.  The prover evaluates it abstractly, as a formula over batch b, head h,
query i and key j with symbolic sizes and data left open, and reads the formula as one interval of keys per query,
less padding (nsa.md).  What it accepts holds for every size and every value; nothing is run and nothing is guessed.

What it takes for granted, because no graph can show it: 32- and 64-bit integers do not overflow; positions are below
2**24, where float32 holds every integer; a bias of at most `MASKED_BELOW` hides a key (as the models mean it: in the
softmax such a key weighs less than e**−9000 of a visible one); and in a row where every key is hidden nobody looks at
what attention returns.
"""

import dataclasses
import functools
from collections.abc import Hashable

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from nsa_compile.passes.predicate.emission import EmittedInterval, emit, is_plain_causal
from nsa_compile.passes.predicate.formula import (
    FALSE,
    TRUE,
    Atom,
    Cases,
    Formula,
    UnknownError,
    compare,
    conjunction,
    expressions,
    formula_of,
    negation,
    substitute_value,
)
from nsa_compile.passes.predicate.graph_builder import GraphBuilder
from nsa_compile.passes.predicate.interpreter import ConstantReader, Interpreter
from nsa_compile.passes.predicate.interval import (
    B_INDEX,
    H_INDEX,
    KEY,
    QUERY,
    Bound,
    Interval,
    Limit,
    Refusal,
    Sizes,
    read_interval,
)
from nsa_compile.passes.predicate.tensor import ZERO, AbstractTensor, Leaf, axis, size_expression
from nsa_compile.passes.predicate.writes import tensor_of
from nsa_compile.passes.sites import AttentionSite, Mask, MaskKind, Reason, Rejection, Scope

# An additive mask hides a key by this much or more: models write -inf, the dtype's minimum, -1e9 or -10000.
MASKED_BELOW = -10_000


@dataclasses.dataclass(frozen=True)
class VisibleKeys:
    """The keys that each query may see, proved.

    Attributes:
        interval: in terms of b, i and j.
        sizes: of the attention.
        scope: the graph that holds all the data which the interval needs; the interval's nodes go there.
        leaves: that data.
        proof: one sentence for each conjunct.
    """

    interval: Interval
    sizes: Sizes
    scope: Scope = dataclasses.field(compare=False)
    leaves: tuple[Leaf, ...] = dataclasses.field(default=(), compare=False)

    @property
    def proof(self) -> tuple[str, ...]:
        """One sentence for each part of the mask."""
        return self.interval.proof

    @property
    def is_causal(self) -> bool:
        """Whether a query's last key is its own place (then no last keys are computed)."""
        return is_plain_causal(self.interval)

    @property
    def is_trivial(self) -> bool:
        """Whether nothing needs to be computed: plain causal, or a single query that sees every key."""
        interval = self.interval
        return not (interval.first or interval.keys or interval.queries or (interval.last and not self.is_causal))

    def key(self) -> Hashable:
        """Equal for attentions whose intervals have the same nodes."""
        interval = self.interval
        ends = (frozenset(interval.first), frozenset(interval.last))
        return (*ends, frozenset(interval.keys), frozenset(interval.queries), self.sizes, id(self.scope.graph_module))

    def describe(self) -> str:
        """The mask in a few words, such as "causal, window 8, padding"."""
        words = ["causal" if self.is_causal else _describe_last(self.interval.last)]
        words += [_describe_first(bound) for bound in self.interval.first]
        words += ["padding"] if self.interval.keys else []
        words += ["padded queries"] if self.interval.queries else []
        return ", ".join(word for word in words if word)


def _describe_last(last: tuple[Bound, ...]) -> str:
    if not last:
        return "all keys"
    limits = [bound.position for bound in last if isinstance(bound, Limit)]
    return "causal from a position" if limits else "documents"


def _describe_first(bound: Bound) -> str:
    if not isinstance(bound, Limit):
        return "documents"
    width = sympy.expand(QUERY - bound.position + 1)
    return f"window {width}" if not width.free_symbols & {QUERY, B_INDEX} else "lower limit"


class MaskProver:
    """Proves masks; one proof serves every attention of a graph that shares the mask.

    Args:
        read_constant: given a placeholder or get_attr node and its scope, the values of the tensor if nothing can
            change them unnoticed (a buffer that no node writes and that is guarded), else None.
    """

    def __init__(self, read_constant: ConstantReader | None = None) -> None:
        self._interpreter = Interpreter(read_constant)
        self._proved: dict[Hashable, VisibleKeys | Rejection] = {}

    def visible_keys(self, site: AttentionSite) -> VisibleKeys | Rejection:
        """Proves which keys each query of a site sees: what its masks and `is_causal` say together."""
        return self.prove(site.masks, site.is_causal, sizes_of(site), site.scope, site.node)

    def prove(
        self, masks: tuple[Mask, ...], is_causal: bool, sizes: Sizes, scope: Scope, reader: fx.Node
    ) -> VisibleKeys | Rejection:
        """Proves masks that all hold.

        Args:
            masks: each broadcastable, right-aligned, to `[B, H, T, S]`.
            is_causal: whether query i sees keys 0…i only, beside what the masks say.
            sizes: of the attention.
            scope: the graph that holds the attention.
            reader: the node that reads the masks; writes in place before it count.
        """
        seen = (tuple((mask, self._version(mask.node, scope, reader)) for mask in masks), is_causal, sizes)
        if seen not in self._proved:
            self._proved[seen] = self._prove(masks, is_causal, sizes, scope, reader)
        return self._proved[seen]

    def _version(self, node: fx.Node, scope: Scope, reader: fx.Node) -> Hashable:
        writes = self._interpreter.writes(scope)
        return writes.value_at(node, writes.position(reader))

    def _prove(
        self, masks: tuple[Mask, ...], is_causal: bool, sizes: Sizes, scope: Scope, reader: fx.Node
    ) -> VisibleKeys | Rejection:
        formula = compare("<=", KEY, QUERY) if is_causal else TRUE
        for mask in masks:
            value = tensor_of(mask.node)
            if value is None:
                return Rejection(Reason.UNKNOWN_SHAPES, f"{mask.node.name} carries no shape", (mask.node,))
            if value.dim() > 4:
                sentence = f"{mask.node.name} has {value.dim()} dimensions"
                return Rejection(Reason.MASK_NOT_PROVED, sentence, (mask.node,))
            tensor = self._interpreter.evaluate(mask.node, scope, reader)
            try:
                allowed = _allowed(tensor, mask, sizes)
            except UnknownError as error:
                return self._explain(Refusal(Reason.MASK_NOT_PROVED, str(error)), masks)
            if isinstance(allowed, Refusal):
                named = dataclasses.replace(allowed, leaves=tuple(self._leaves(tensor.value)))
                return self._explain(named, masks)
            formula = conjunction(formula, allowed)
        result = read_interval(formula, sizes, self._interpreter.leaf)
        if isinstance(result, Refusal):
            return self._explain(result, masks)
        return self._placed(result, sizes, scope, masks)

    def _placed(
        self, interval: Interval, sizes: Sizes, scope: Scope, masks: tuple[Mask, ...]
    ) -> VisibleKeys | Rejection:
        """Finds the graph in which the interval can be computed."""
        leaves = tuple(self._leaves_of(interval))
        scopes = {id(leaf.scope.graph_module): leaf.scope for leaf in leaves}
        if len(scopes) > 1:
            sentence = "the mask is made of data from inside and from outside a checkpointed body"
            return Rejection(Reason.MASK_NOT_PROVED, sentence, tuple(mask.node for mask in masks))
        return VisibleKeys(interval, sizes, next(iter(scopes.values()), scope), leaves)

    def _leaves_of(self, interval: Interval) -> list[Leaf]:
        parts: list[sympy.Expr] = []
        for bound in (*interval.first, *interval.last):
            parts += [bound.position] if isinstance(bound, Limit) else [bound.values, bound.target]
        for formula in (*interval.keys, *interval.queries):
            parts += expressions(formula)
        return self._named({a.func.__name__ for part in parts for a in part.atoms(AppliedUndef)})

    def _leaves(self, value: Formula | Cases) -> list[Leaf]:
        cases = value if isinstance(value, tuple) else ((value, ZERO),)
        parts = {e for condition, _ in cases for e in expressions(condition)} | {e for _, e in cases}
        return self._named({a.func.__name__ for part in parts for a in part.atoms(AppliedUndef)})

    def _named(self, names: set[str]) -> list[Leaf]:
        return [self._interpreter.leaf(name) for name in sorted(names)]

    def _explain(self, refusal: Refusal, masks: tuple[Mask, ...]) -> Rejection:
        """A refusal as a rejection: names the nodes at fault, and the known kinds of bias."""
        nodes = tuple(leaf.written_by for leaf in refusal.leaves) or tuple(mask.node for mask in masks)
        return Rejection(refusal.reason, refusal.sentence, nodes)

    def emit(self, visible: VisibleKeys, before: fx.Node, device: torch.device) -> EmittedInterval:
        """Adds the nodes that compute the visible keys.

        Args:
            visible: what was proved.
            before: a node of `visible.scope`'s graph; the new nodes are inserted directly before it.
            device: where new tensors live.
        """
        builder = GraphBuilder(before, device)
        read = functools.partial(self._read, builder, visible.scope, before)
        return emit(visible.interval, visible.sizes, builder, read, self._interpreter.leaf)

    def _read(self, builder: GraphBuilder, scope: Scope, before: fx.Node, leaf: Leaf) -> fx.Node:
        """A node that holds, at `before`, the values that the leaf had when the mask was made."""
        writes = self._interpreter.writes(scope)
        start, end = writes.position(leaf.written_by), writes.position(before)
        if any(True for _ in writes.between(leaf.node, start, end)):
            return builder.snapshot(leaf.node, leaf.written_by)
        return leaf.node


def sizes_of(site: AttentionSite) -> Sizes:
    """The site's sizes as expressions."""
    return Sizes(
        size_expression(site.batch),
        size_expression(site.query_heads),
        size_expression(site.query_length),
        size_expression(site.key_length),
    )


def _allowed(tensor: AbstractTensor, mask: Mask, sizes: Sizes) -> Formula | Refusal:
    """The mask as a formula over b, h, i and j of the visible keys."""
    index = (B_INDEX, H_INDEX, QUERY, KEY)
    lengths = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    offset = 4 - tensor.rank
    moved = {axis(k): ZERO if lengths[k + offset] == 1 else index[k + offset] for k in range(tensor.rank)}
    value = substitute_value(tensor.value, moved)
    if mask.kind is MaskKind.ALLOWED:
        return formula_of(value)
    if mask.kind is MaskKind.BLOCKED:
        return negation(formula_of(value))
    if not isinstance(value, tuple):
        return Refusal(Reason.MASK_NOT_PROVED, f"{mask.node.name} is added to the scores although it is {tensor.dtype}")
    return _unbiased(value, mask)


def _unbiased(cases: Cases, mask: Mask) -> Formula | Refusal:
    """Where an additive mask is 0; elsewhere it must hide the key."""
    allowed = FALSE
    for condition, expression in cases:
        bias = _under(condition, expression)
        if bias.is_number and bias.is_extended_real and bias <= MASKED_BELOW:
            continue
        if bias != 0:
            what = f"{bias}" if bias.is_number else f"{bias}, which is not known to be 0 or below {MASKED_BELOW},"
            return Refusal(Reason.ADDITIVE_BIAS, f"{mask.node.name} adds {what} to the scores")
        allowed = condition if allowed == FALSE else _either(allowed, condition)
    return allowed


def _either(left: Formula, right: Formula) -> Formula:
    from nsa_compile.passes.predicate.formula import disjunction

    return disjunction(left, right)


def _under(condition: Formula, expression: sympy.Expr) -> sympy.Expr:
    """The expression where the condition holds: with `e = 0` known, multiples of `e` fall away."""
    parts = condition.operands if not isinstance(condition, Atom) and hasattr(condition, "operands") else (condition,)
    for part in parts:
        if isinstance(part, Atom) and part.relation.value == "=":
            for sign in (1, -1):
                rest = sympy.expand(expression + sign * part.expression)
                if rest.is_number:
                    return rest
    return expression
