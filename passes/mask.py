"""Proves which keys each query of an attention may see, or says what stopped the proof.

A mask is a graph of ordinary operations.  The prover evaluates it abstractly, as a formula over batch b, head h,
query i and key j with symbolic sizes and data left open, and reads the formula as one interval of keys per query,
less padding (nsa.md).  What it accepts holds for every size and every value; nothing is run and nothing is guessed.

Padding is often written as `(1 - mask) * -10000`, which hides keys only if the mask from outside holds 0 and 1 alone.
That is data, so it is not proved but checked, by an operator among the interval's nodes.

What it takes for granted, because no graph can show it: 32- and 64-bit integers do not overflow; positions are below
2**24, where float32 holds every integer; a bias of at most `MASKED_BELOW` hides a key, as models mean it; in a
row where every key is hidden nobody looks at what attention returns; and a `BlockMask` that comes from outside lists
the blocks of its own mask_mod, as torch's eager flex_attention, which reads the mask_mod alone, takes for granted too.
"""

import contextlib
import functools
from collections.abc import Hashable, Iterable

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from nsa_compile.passes.mask_values import MaskValues
from nsa_compile.passes.metadata import tensor_of
from nsa_compile.passes.predicate.additive import unbiased
from nsa_compile.passes.predicate.cases import Cases, cases_of, combine, formula_of, value_symbols
from nsa_compile.passes.predicate.causes import cause_of_bias, is_selection
from nsa_compile.passes.predicate.emission import EmittedInterval, emit, sizes_needed
from nsa_compile.passes.predicate.facts import decide
from nsa_compile.passes.predicate.formula import compare, conjunction, disjunction, map_atoms, negation
from nsa_compile.passes.predicate.graph_builder import GraphBuilder, HeldSizes
from nsa_compile.passes.predicate.interpreter import ConstantReader, Interpreter
from nsa_compile.passes.predicate.interval import Interval, Limit, Refusal, Sizes, read_interval
from nsa_compile.passes.predicate.suppositions import are_padding, doubted, require_binary
from nsa_compile.passes.predicate.tensor import KEY, QUERY, Leaf, number_expression, size_expression
from nsa_compile.passes.predicate.terms import TRUE, Formula, UnknownError, expressions
from nsa_compile.passes.predicate.words import text
from nsa_compile.passes.sites import AttentionSite, Mask, MaskKind, Reason, Rejection, Scope
from nsa_compile.passes.visible import VisibleKeys


class MaskProver:
    """Proves masks; one proof serves every attention of a graph that shares the mask.

    Args:
        read_constant: given a placeholder or get_attr node and its scope, the values of the tensor if nothing can
            change them unnoticed (a buffer that no node writes and that is guarded), else None.
        binary: names of data from outside that is supposed to hold 0 and 1 alone.
    """

    def __init__(self, read_constant: ConstantReader | None = None, binary: frozenset[str] = frozenset()) -> None:
        self._read_constant = read_constant
        self._binary = binary
        self._supposing: dict[frozenset[str], MaskProver] = {}
        self._interpreter = Interpreter(read_constant, binary)
        self._masks = MaskValues(self._interpreter)
        self._proved: dict[Hashable, VisibleKeys | Rejection] = {}
        self._held: dict[fx.Graph, HeldSizes] = {}

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
        writes = self._interpreter.writes(scope)
        place = writes.position(reader)
        seen = tuple((mask, None if mask.predicate else writes.last_write(mask.node, place)) for mask in masks)
        key = (seen, is_causal, sizes, scope.graph_module)
        if key not in self._proved:
            result = self._prove(masks, is_causal, sizes, scope, reader)
            if isinstance(result, Rejection):
                result = self._supposed(result, masks, is_causal, sizes, scope, reader)
            self._proved[key] = result
        return self._proved[key]

    def _supposed(
        self,
        rejection: Rejection,
        masks: tuple[Mask, ...],
        is_causal: bool,
        sizes: Sizes,
        scope: Scope,
        reader: fx.Node,
    ) -> VisibleKeys | Rejection:
        """Tries once more where arithmetic stopped the proof, supposing that what it is computed of is 0 or 1."""
        names: frozenset[str] = frozenset()
        for mask in masks:
            if tensor_of(mask.node) is not None:
                with contextlib.suppress(UnknownError):
                    leaves = self._at_fault(mask, rejection, sizes, scope, reader)
                    names |= doubted(leaves, self._interpreter.leaf)
        if names <= self._binary:
            return rejection
        result = self._where_binary(self._binary | names).prove(masks, is_causal, sizes, scope, reader)
        if isinstance(result, VisibleKeys) and rejection.reason is Reason.MASK_NOT_PROVED:
            return result if are_padding(names, result.interval) else rejection
        is_told = isinstance(result, VisibleKeys) or result.reason is Reason.MASK_IS_INPUT
        return result if is_told else rejection

    def _at_fault(
        self, mask: Mask, rejection: Rejection, sizes: Sizes, scope: Scope, reader: fx.Node
    ) -> tuple[Leaf, ...]:
        """The data in the bias that a mask adds, or the results of inexact arithmetic that it is made of."""
        if mask.kind is MaskKind.ADDITIVE:
            _, bias = self._unbiased(mask, sizes, scope, reader)
            return () if bias is None else self._leaves([bias])
        if mask.kind not in (MaskKind.BLOCKED, MaskKind.ALLOWED) or rejection.reason is not Reason.MASK_NOT_PROVED:
            return ()
        formula = formula_of(self._masks.value(mask, sizes, scope, reader))
        return tuple(leaf for leaf in self._leaves(expressions(formula)) if leaf.computed_of)

    def _where_binary(self, names: frozenset[str]) -> "MaskProver":
        """The prover that supposes so."""
        if names == self._binary:
            return self
        if names not in self._supposing:
            self._supposing[names] = MaskProver(self._read_constant, names)
        return self._supposing[names]

    def _prove(
        self, masks: tuple[Mask, ...], is_causal: bool, sizes: Sizes, scope: Scope, reader: fx.Node
    ) -> VisibleKeys | Rejection:
        formula = compare("<=", KEY, QUERY) if is_causal else TRUE
        for mask in sorted(masks, key=lambda mask: mask.kind is MaskKind.GATE):
            recorded = tensor_of(mask.node)
            if recorded is None:
                return Rejection(Reason.UNKNOWN_SHAPES, f"{mask.node.name} carries no shape.", (mask.node,))
            if recorded.dim() > 4 and mask.axes is None:
                sentence = f"{mask.node.name} has {recorded.dim()} dimensions, which are not [B, H, T, S]."
                return Rejection(Reason.MASK_NOT_PROVED, sentence, (mask.node,))
            try:
                allowed = self._allowed(mask, sizes, scope, reader)
            except UnknownError as error:
                return Rejection(Reason.MASK_NOT_PROVED, f"{mask.node.name}: {error}.", (mask.node,))
            if isinstance(allowed, Rejection):
                telling = self._most_telling(allowed, masks, sizes, scope, reader)
                return telling if is_causal else self._without_order(masks, sizes, scope, reader) or telling
            if mask.kind is MaskKind.GATE and conjunction(formula, allowed) != formula:
                sentence = f"{mask.node.name} makes scores 0 that no mask hides."
                return Rejection(Reason.MULTIPLIED_SCORES, sentence, (mask.node,))
            formula = conjunction(formula, allowed)
        visible = self._read(formula, sizes, scope, masks, reader)
        if isinstance(visible, Rejection):
            return visible
        for mask in masks:
            if not self._masks.is_of_its_blocks(mask, sizes, scope, reader):
                sentence = f"The blocks that are visited are those of another mask than {mask.node.name}."
                return Rejection(Reason.MASK_NOT_PROVED, sentence, (mask.node,))
        return visible

    def _most_telling(
        self, rejection: Rejection, masks: tuple[Mask, ...], sizes: Sizes, scope: Scope, reader: fx.Node
    ) -> Rejection:
        """Gives way to a mask that is a bias by position: that is there whatever the mask at fault holds."""
        for mask in masks:
            if mask.kind is not MaskKind.ADDITIVE or tensor_of(mask.node) is None:
                continue
            with contextlib.suppress(UnknownError):
                other = self._allowed(mask, sizes, scope, reader)
                if isinstance(other, Rejection) and other.reason in (Reason.LEARNED_BIAS, Reason.ALIBI):
                    return other
        return rejection

    def _without_order(self, masks: tuple[Mask, ...], sizes: Sizes, scope: Scope, reader: fx.Node) -> Rejection | None:
        """Says that queries see the future: a mask that is the same for all queries hides it from none of them."""
        formula = TRUE
        try:
            for mask in masks:
                if QUERY in value_symbols(self._masks.value(mask, sizes, scope, reader)):
                    allowed = self._allowed(mask, sizes, scope, reader)
                    if isinstance(allowed, Rejection):
                        return None
                    formula = conjunction(formula, allowed)
        except UnknownError:
            return None
        result = self._read(formula, sizes, scope, masks, reader)
        return result if isinstance(result, Rejection) and result.reason is Reason.BIDIRECTIONAL else None

    def _allowed(self, mask: Mask, sizes: Sizes, scope: Scope, reader: fx.Node) -> Formula | Rejection:
        """The mask as a formula over b, h, i and j of the visible keys."""
        value = self._masks.value(mask, sizes, scope, reader)
        if mask.kind is MaskKind.BLOCKED:
            return negation(formula_of(value))
        if mask.kind is MaskKind.ALLOWED:
            return formula_of(value)
        if mask.kind in (MaskKind.WEIGHT, MaskKind.GATE):
            return self._weighed(mask, cases_of(value))
        allowed, bias = self._unbiased(mask, sizes, scope, reader)
        if bias is None:
            return allowed
        leaves = self._leaves([bias])
        is_lost = any(leaf.stale for leaf in leaves)
        reason = Reason.MUTATED_MASK if is_lost else cause_of_bias(leaves, bias.free_symbols)
        what = text(bias) + (f", and {leaves[0].name} is data: {leaves[0].cause}" if leaves else "")
        nodes = tuple(leaf.written_by for leaf in leaves) or (mask.node,)
        return Rejection(reason, f"{mask.node.name} adds to the scores {what}.", nodes)

    def _unbiased(self, mask: Mask, sizes: Sizes, scope: Scope, reader: fx.Node) -> tuple[Formula, sympy.Expr | None]:
        """Where an additive mask leaves the scores as they are, and the first bias that no mask adds."""
        factor = number_expression(mask.factor)
        return unbiased(combine(lambda bias: bias * factor, self._masks.value(mask, sizes, scope, reader)))

    def _weighed(self, mask: Mask, cases: Cases) -> Formula | Rejection:
        """Where a mask that multiplies the weights is 1; elsewhere it has to be 0."""
        others = [weight for _, weight in cases if weight not in (0, 1)]
        if not others:
            return disjunction(*(condition for condition, weight in cases if weight == 1))
        leaves = self._leaves(others[:1])
        reason = Reason.MULTIPLIED_SCORES if mask.kind is MaskKind.GATE else Reason.PROBABILITIES_CHANGED
        what = "scores" if mask.kind is MaskKind.GATE else "weights"
        sentence = f"{mask.node.name} multiplies {what} by {text(others[0])}, not proved to be 0 or 1."
        nodes = tuple(leaf.written_by for leaf in leaves) or (mask.node,)
        return Rejection(reason, sentence, nodes)

    def _read(
        self, formula: Formula, sizes: Sizes, scope: Scope, masks: tuple[Mask, ...], reader: fx.Node
    ) -> VisibleKeys | Rejection:
        """The formula as an interval that can be computed in one graph."""
        mask_nodes = tuple(mask.node for mask in masks)
        formula = map_atoms(formula, functools.partial(decide, ranges=sizes.ranges))
        result = read_interval(formula, sizes, self._interpreter.leaf)
        if isinstance(result, Refusal):
            reason = result.reason
            # A selection is made for each head by itself, or is computed with an operation that is not followed.
            if reason in (Reason.MASK_NOT_PROVED, Reason.MASK_DEPENDS_ON_HEAD) and is_selection(result.leaves):
                reason = Reason.ALREADY_SPARSE
            nodes = tuple(leaf.written_by for leaf in result.leaves) or mask_nodes
            return Rejection(reason, f"{result.sentence}.", nodes)
        checked = tuple(map(self._interpreter.leaf, sorted(self._binary)))
        leaves = tuple(dict.fromkeys((*self._leaves(_parts(result)), *checked)))
        inside = [leaf for leaf in leaves if not _is_around(leaf.scope, scope)]
        if inside:
            sentence = f"{inside[0].name} is computed inside of the mask's own graph, and {inside[0].cause}."
            return Rejection(Reason.MASK_NOT_PROVED, sentence, tuple(leaf.written_by for leaf in inside))
        homes = {leaf.scope.graph_module: leaf.scope for leaf in leaves}
        if len(homes) > 1:
            sentence = "The mask is made of data from inside and from outside of a body that is run by an operator."
            return Rejection(Reason.MASK_NOT_PROVED, sentence, mask_nodes)
        home = next(iter(homes.values()), scope)
        anchor, level = reader, scope
        while level.graph_module is not home.graph_module and level.parent is not None:
            anchor, level = level.calls[0], level.parent
        held = self._held_sizes(home)
        needed = sizes_needed(result, sizes) | ({sizes.keys} if self._binary else set())
        missing = [size for size in needed if not held.can_compute(size, anchor)]
        if missing:
            sentence = f"Nothing before the attention holds the size {missing[0]}, which the mask needs."
            return Rejection(Reason.MASK_NOT_PROVED, sentence, mask_nodes)
        return VisibleKeys(result, sizes, home, leaves, self._binary)

    def _held_sizes(self, scope: Scope) -> HeldSizes:
        graph = scope.graph_module.graph
        if graph not in self._held:
            self._held[graph] = HeldSizes(graph)
        return self._held[graph]

    def _leaves(self, parts: Iterable[sympy.Expr]) -> tuple[Leaf, ...]:
        names = {application.func.__name__ for part in parts for application in part.atoms(AppliedUndef)}
        return tuple(self._interpreter.leaf(name) for name in sorted(names))

    def emit(
        self, visible: VisibleKeys, before: fx.Node, device: torch.device, attention: str = "an attention"
    ) -> EmittedInterval:
        """Adds the nodes that compute the visible keys, and check what they suppose.

        Args:
            visible: what was proved.
            before: a node of `visible.scope`'s graph; the new nodes are inserted directly before it, copies of data
                that is overwritten on the way where it still has its value.
            device: where new tensors live.
            attention: what a check that fails calls the attention.
        """
        if visible.binary != self._binary:
            return self._where_binary(visible.binary).emit(visible, before, device, attention)
        builder = GraphBuilder(visible.scope.graph_module, before, device, self._held_sizes(visible.scope))
        writes = self._interpreter.writes(visible.scope)

        def read(leaf: Leaf) -> fx.Node:
            # Writes after `before` count too: attentions that follow read the same nodes.
            overwritten = any(True for _ in writes.after(leaf.node, writes.position(leaf.written_by)))
            return builder.snapshot(leaf.node, leaf.written_by) if overwritten else leaf.node

        read = functools.cache(read)
        binary = map(self._interpreter.leaf, sorted(visible.binary))
        required = [require_binary(leaf, builder, read, attention) for leaf in binary]
        return emit(visible.interval, visible.sizes, builder, read, self._interpreter.leaf, required)


def sizes_of(site: AttentionSite) -> Sizes:
    """The site's sizes as expressions."""
    return Sizes(*map(size_expression, (site.batch, site.query_heads, site.query_length, site.key_length)))


def _is_around(outer: Scope, scope: Scope) -> bool:
    """Whether a scope is another one or holds it."""
    while scope.graph_module is not outer.graph_module and scope.parent is not None:
        scope = scope.parent
    return scope.graph_module is outer.graph_module


def _parts(interval: Interval) -> list[sympy.Expr]:
    """Every expression of an interval."""
    parts: list[sympy.Expr] = []
    for bound in (*interval.first, *interval.last):
        parts += [bound.position] if isinstance(bound, Limit) else [bound.values, bound.target]
    for formula in (*interval.keys, *interval.queries):
        parts += expressions(formula)
    return parts
