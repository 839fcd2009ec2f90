"""Attention scores, read backwards from the softmax: scale · Q Kᵀ + masks, in whatever order a model writes it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from nsa_compile.passes.axes import Dimension, Dimensions, flat, leaves, unify_dimensions
from nsa_compile.passes.calls import arguments, operation
from nsa_compile.passes.constants import constant_of
from nsa_compile.passes.contractions import Contraction, is_contraction, is_weight, read_contraction
from nsa_compile.passes.layout import LabelledTensor
from nsa_compile.passes.metadata import (
    fixed_number_of,
    number_of,
    recorded_dtype,
    recorded_shape,
    recorded_value,
    same_shape,
    shape_of,
    tensor_of,
)
from nsa_compile.passes.parts import FactorPart, MaskPart, Problem
from nsa_compile.passes.predicate.additive import MASKED_BELOW
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.sites import MaskKind, Reason
from nsa_compile.passes.two_products import two_products, vagueness
from nsa_compile.passes.views import back_through, broadcast_dimensions


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a softmax is taken of: product · scale · factors + masks.

    Attributes:
        product: the product of queries and keys; None where the reader was told which node that is.
        scale: a number.
        symbolic_scales: symbolic numbers that scale it too, with the power of each.
        factors: tensors that scale the product.
        masks: all of them hold.
    """

    product: Contraction | None
    scale: float
    symbolic_scales: tuple[tuple[fx.Node, int], ...]
    factors: tuple[FactorPart, ...]
    masks: tuple[MaskPart, ...]

    @property
    def contraction(self) -> Contraction:
        """The product.

        Raises:
            LookupError: the reader was told which node the product is, and did not read it.
        """
        if self.product is None:
            raise LookupError("the product was not read")
        return self.product


@dataclasses.dataclass(frozen=True)
class _State:
    """The scores at `node`, and what stands between them and the softmax."""

    node: fx.Node
    dims: Dimensions
    scale: float = 1.0
    symbolic_scales: tuple[tuple[fx.Node, int], ...] = ()
    factors: tuple[FactorPart, ...] = ()
    masks: tuple[MaskPart, ...] = ()

    def back_to(self, node: fx.Node, dims: Dimensions | None = None, **changes: Any) -> "_State":
        return dataclasses.replace(self, node=node, dims=dims or self.dims, **changes)


_Bound = Mapping[str, Any]
# What an operation does to the scores: where reading goes on, for each operand that may be the scores; or a problem.
_Outcome = list[_State] | Problem


class ScoreReader:
    """Reads the scores of one softmax.

    Args:
        keys: the axes over which the softmax is taken.
        writes: the in-place writes of the graph.
        site: the node that the operator would replace; what is read must hold until then.
        product: a node that is the product; None where any contraction is.
    """

    def __init__(self, keys: Dimension, writes: Writes, site: fx.Node, product: fx.Node | None = None) -> None:
        self._keys = keys
        self._writes = writes
        self._site = site
        self._product = product

    def read(self, node: fx.Node, dims: Dimensions, reader: fx.Node, scale: float = 1.0) -> Scores | Problem:
        """Reads backwards from the softmax's input.

        Args:
            node: the input.
            dims: its dimensions.
            reader: the softmax.
            scale: what the input is multiplied by: log 2 for a softmax of powers of 2.
        """
        return self._follow(_State(node, dims, scale), reader)

    def _follow(self, state: _State, reader: fx.Node) -> Scores | Problem:
        while True:
            write = self._writes.last_write(state.node, self._writes.position(reader))
            node = state.node if write is None else write.writer
            if write is not None and not write.whole:
                return Problem(Reason.UNKNOWN_SPELLING, f"A part of {state.node} is written in place.", (state.node,))
            state = dataclasses.replace(state, node=node)
            if node is self._product:
                return Scores(None, state.scale, state.symbolic_scales, state.factors, state.masks)
            if is_contraction(node):
                return self._finish(state)
            outcome = self._step(state)
            if isinstance(outcome, Problem):
                return outcome
            if len(outcome) > 1:
                return self._only([self._follow(each, node) for each in outcome], node)
            state, reader = outcome[0], node

    def _only(self, attempts: list[Scores | Problem], node: fx.Node) -> Scores | Problem:
        """The one reading that succeeded, or the most telling of the problems."""
        read = [attempt for attempt in attempts if isinstance(attempt, Scores)]
        if len(read) == 1:
            return read[0]
        if read:
            return two_products(node, [scores.product for scores in read], self._keys)
        problems = [attempt for attempt in attempts if isinstance(attempt, Problem)]
        return min(problems, key=vagueness)

    def _finish(self, state: _State) -> Scores | Problem:
        product = read_contraction(state.node)
        if product is None or not unify_dimensions(product.dims, state.dims):
            sentence = f"The product {state.node} has a form that is not known."
            return Problem(Reason.UNKNOWN_SPELLING, sentence, (state.node,))
        weight = next((each.node for each in (product.left, product.right) if is_weight(each.node)), None)
        if weight is not None:
            sentence = f"{state.node} mixes the scores with the weight {weight}."
            return Problem(Reason.MULTIPLIED_SCORES, sentence, (state.node, weight))
        if product.added is not None:
            added, factor = product.added
            masked = self._masked(state, added, MaskKind.ADDITIVE, factor)
            if isinstance(masked, Problem):
                return masked
            state = masked
        return Scores(product, state.scale * product.alpha, state.symbolic_scales, state.factors, state.masks)

    def _step(self, state: _State) -> _Outcome:
        carried = back_through(state.node, state.dims)
        if carried is not None:
            return [state.back_to(*carried)]
        name, bound = operation(state.node), arguments(state.node)
        rule = _RULES.get(name)
        if rule is None or bound is None:
            sentence = f"{name} ({state.node}) stands between the product and the softmax."
            return Problem(_KNOWN_BY_NAME.get(name, Reason.UNKNOWN_SPELLING), sentence, (state.node,))
        return rule(self, state, bound)

    def _constant(self, value: Any, state: _State) -> "float | int | bool | None":
        return constant_of(value, state.node, self._writes)

    def _operands(self, state: _State, bound: _Bound, commutes: bool) -> Iterator[tuple[fx.Node, Any]]:
        """Pairs the operand that may be the scores, by its shape, with the other one."""
        pairs = [(bound["input"], bound["other"])]
        pairs += [(bound["other"], bound["input"])] if commutes else []
        for scores, other in pairs:
            shape = shape_of(scores)
            if shape is not None and same_shape(shape, recorded_shape(state.node)):
                yield scores, other

    def _masked(self, state: _State, mask: fx.Node, kind: MaskKind, factor: float = 1.0) -> "_State | Problem":
        """Notes a mask; the scale that comes between it and the softmax applies to it too."""
        place = self._writes.position
        if any(True for _ in self._writes.between(mask, place(state.node), place(self._site))):
            return Problem(Reason.MUTATED_MASK, f"{mask} is written in place after {state.node} reads it.", (mask,))
        dims = broadcast_dimensions(mask, state.dims)
        if dims is None:
            return Problem(Reason.UNKNOWN_SPELLING, f"The shape of {mask} does not fit the scores.", (mask,))
        if any(noted.kind is MaskKind.GATE for noted in state.masks):
            sentence = f"What {mask} hides is multiplied by another mask before the softmax."
            return Problem(Reason.MULTIPLIED_SCORES, sentence, (mask,))
        if state.factors or state.symbolic_scales or state.scale <= 0:
            sentence = f"What {mask} hides is scaled by no positive number before the softmax."
            return Problem(Reason.UNKNOWN_SPELLING, sentence, (mask,))
        noted = MaskPart(LabelledTensor(mask, dims), kind, factor * state.scale)
        return dataclasses.replace(state, masks=(*state.masks, noted))

    # The rules: what an operation does to scores.

    def _unchanged(self, state: _State, bound: _Bound) -> _Outcome:
        return [state.back_to(bound["input"])]

    def _dropped_out(self, state: _State, bound: _Bound) -> _Outcome:
        if is_inactive_dropout(bound):
            return [state.back_to(bound["input"])]
        return Problem(Reason.DROPOUT, f"{state.node} drops scores out.", (state.node,))

    def _scaled(self, state: _State, bound: _Bound) -> _Outcome:
        is_divisor = operation(state.node) == "div"
        outcomes = []
        for scores, other in self._operands(state, bound, commutes=not is_divisor):
            number = self._constant(other, state)
            if number is None and isinstance(recorded_value(other), torch.SymFloat):
                # A mask before the scale hides a key only if this is positive.
                number = fixed_number_of(other)
            if number:
                factor = 1 / number if is_divisor else number
                return [state.back_to(scores, scale=state.scale * factor)]
            if isinstance(recorded_value(other), torch.SymFloat | torch.SymInt):
                symbolic = (*state.symbolic_scales, (other, -1 if is_divisor else 1))
                return [state.back_to(scores, symbolic_scales=symbolic)]
            dims = broadcast_dimensions(other, state.dims) if isinstance(other, fx.Node) else None
            if dims is None or bound.get("rounding_mode") is not None:
                continue
            if self._has_keys(dims):
                masked = None if is_divisor or not state.masks else self._masked(state, other, MaskKind.GATE)
                outcomes += [masked.back_to(scores)] if isinstance(masked, _State) else []
            else:
                factor = FactorPart(LabelledTensor(other, dims), is_divisor)
                outcomes.append(state.back_to(scores, factors=(*state.factors, factor)))
        sentence = f"{state.node} multiplies the scores by a tensor that differs between keys."
        return outcomes or Problem(Reason.MULTIPLIED_SCORES, sentence, (state.node,))

    def _has_keys(self, dims: Dimensions) -> bool:
        return not set(flat(dims)).isdisjoint(leaves(self._keys))

    def _biased(self, state: _State, bound: _Bound) -> _Outcome:
        sign = -1 if operation(state.node) == "sub" else 1
        outcomes: list[_State | Problem] = []
        for scores, other in self._operands(state, bound, commutes=sign == 1):
            factor = number_of(bound.get("alpha", 1))
            if self._constant(other, state) is not None or self._is_same_for_all_keys(other, state):
                # The softmax does not see it.
                return [state.back_to(scores)]
            if factor is None or tensor_of(other) is None or recorded_dtype(other).is_complex:
                outcomes.append(Problem(Reason.UNKNOWN_SPELLING, f"{state.node} adds {other}.", (state.node,)))
                continue
            masked = self._masked(state, other, MaskKind.ADDITIVE, sign * factor)
            outcomes.append(masked if isinstance(masked, Problem) else masked.back_to(scores))
        states = [outcome for outcome in outcomes if isinstance(outcome, _State)]
        if states:
            return states
        sentence = f"{state.node} adds what is larger than the scores."
        problems = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
        return problems[0] if problems else Problem(Reason.UNKNOWN_SPELLING, sentence, (state.node,))

    def _is_same_for_all_keys(self, other: Any, state: _State) -> bool:
        """Whether what is added is one number for each query, such as the scores' maximum."""
        dims = broadcast_dimensions(other, state.dims) if tensor_of(other) is not None and self._keys else None
        return dims is not None and not self._has_keys(dims)

    def _filled(self, state: _State, bound: _Bound) -> _Outcome:
        return self._hidden(state, bound["input"], bound["mask"], MaskKind.BLOCKED, bound["value"])

    def _chosen(self, state: _State, bound: _Bound) -> _Outcome:
        condition, chosen, other = (bound.get(name) for name in ("condition", "input", "other"))
        if self._fill(other, state) is not None:
            return self._hidden(state, chosen, condition, MaskKind.ALLOWED, other)
        return self._hidden(state, other, condition, MaskKind.BLOCKED, chosen)

    def _hidden(self, state: _State, scores: Any, mask: Any, kind: MaskKind, value: Any) -> _Outcome:
        number = self._fill(value, state)
        if number is None or not isinstance(mask, fx.Node) or not isinstance(scores, fx.Node):
            return Problem(Reason.UNKNOWN_SPELLING, f"{state.node} fills in something unknown.", (state.node,))
        if number * state.scale > MASKED_BELOW:
            sentence = f"{state.node} fills in {number}, which does not hide a key."
            return Problem(Reason.ADDITIVE_BIAS, sentence, (state.node,))
        if not same_shape(shape_of(scores) or (), recorded_shape(state.node)):
            return Problem(Reason.UNKNOWN_SPELLING, f"{state.node} is larger than the scores.", (state.node,))
        masked = self._masked(state, mask, kind)
        return masked if isinstance(masked, Problem) else [masked.back_to(scores)]

    def _fill(self, value: Any, state: _State) -> "float | int | bool | None":
        """The number that is filled in where a key is hidden."""
        number = self._constant(value, state)
        if number is None and isinstance(recorded_value(value), torch.SymFloat):
            # A module's attribute under dynamic shapes: it is the same from call to call.
            number = fixed_number_of(value)
        return self._writes.number_from_outside(value, state.node) if number is None else number

    def _clamped(self, state: _State, bound: _Bound) -> _Outcome:
        """A lower limit so low that only hidden keys reach it changes nothing."""
        limits = [bound[name] for name in ("min", "other") if bound.get(name) is not None]
        number = self._constant(limits[0], state) if len(limits) == 1 and bound.get("max") is None else None
        if number is None or number * state.scale > MASKED_BELOW:
            return Problem(Reason.UNKNOWN_SPELLING, f"{state.node} limits the scores.", (state.node,))
        return [state.back_to(bound["input"])]


def is_inactive_dropout(bound: _Bound) -> bool:
    """Tells whether a dropout does nothing: in evaluation, or with probability 0."""
    return number_of(bound.get("training", True)) == 0 or number_of(bound.get("p", 0.5)) == 0


_RULES: Mapping[str, Callable[[ScoreReader, _State, _Bound], _Outcome]] = {
    "to": ScoreReader._unchanged,
    "dropout": ScoreReader._dropped_out,
    "mul": ScoreReader._scaled,
    "div": ScoreReader._scaled,
    "add": ScoreReader._biased,
    "sub": ScoreReader._biased,
    "masked_fill": ScoreReader._filled,
    "where": ScoreReader._chosen,
    "clamp": ScoreReader._clamped,
    "maximum": ScoreReader._clamped,
    "max": ScoreReader._clamped,
}
_KNOWN_BY_NAME: Mapping[str, Reason] = {
    "tanh": Reason.SOFTCAP,
    **dict.fromkeys(("cat", "pad", "constant_pad_nd"), Reason.ATTENTION_SINKS),
}
