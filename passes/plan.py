"""Policy: which sites become NSA, with what arguments, and why the others do not."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import fx
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, statically_known_true

from nsa_compile.config import NSAConfig
from nsa_compile.passes.dataflow import ActivationFlow, Relation
from nsa_compile.passes.learned import LearnedParts, LearnedPartsReader, Marker
from nsa_compile.passes.mask import MaskProver
from nsa_compile.passes.metadata import device_of, dtype_of, fixed_number_of, same_size
from nsa_compile.passes.predicate.interpreter import ConstantReader
from nsa_compile.passes.scopes import is_extensible, outward
from nsa_compile.passes.sites import AttentionSite, Place, Reason, Rejection, Scope, Size
from nsa_compile.passes.visible import VisibleKeys

# Largest head size that the GPU kernels keep in registers and shared memory.
MAX_HEAD_SIZE = 256
_DTYPES = {
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
    "other": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


@dataclasses.dataclass(frozen=True)
class Replacement:
    """An attention that becomes NSA, and all that its operator needs.

    Attributes:
        site: the attention.
        scale: factor of the scores, as a number; None for 1/sqrt(D).
        visible: the keys that each query sees.
        config: the configuration of NSA.
        learned: the learned parts; None for what has none.
    """

    site: AttentionSite
    scale: float | None
    visible: VisibleKeys
    config: NSAConfig
    learned: LearnedParts | None = None


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one attention: either `replacement` or `rejection` is given.

    Attributes:
        place: where it is.
        site: how it was read; None where it could not be.
        mask: what a query sees, in a few words; "" where that is unknown.
        proof: how that was proved, a sentence for each part.
        replacement: what it is replaced by; None where it stays as it is.
        rejection: why it stays as it is; None where it is rewritten.
        marker: what binds the learned parts of its module; None where none are attached.
    """

    place: Place
    site: AttentionSite | None = None
    mask: str = ""
    proof: tuple[str, ...] = ()
    replacement: Replacement | None = None
    rejection: Rejection | None = None
    marker: Marker | None = None


@dataclasses.dataclass(frozen=True)
class RewritePlan:
    """What becomes of every attention of a graph.

    Attributes:
        config: the configuration that the rewritten sites get.
        decisions: one for each attention, in order.
        markers: all markers of the graph; the rewrite erases them.
        prover: what proved the masks; it knows how to compute visible keys in the graph.
    """

    config: NSAConfig
    decisions: tuple[Decision, ...]
    markers: tuple[Marker, ...]
    prover: MaskProver = dataclasses.field(repr=False, compare=False)

    @property
    def replacements(self) -> tuple[Replacement, ...]:
        """The attentions that become NSA."""
        return tuple(decision.replacement for decision in self.decisions if decision.replacement is not None)

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The graphs that the rewrite changes."""
        return tuple(each.scope for each in (*(replacement.site for replacement in self.replacements), *self.markers))

    @property
    def unused_markers(self) -> tuple[Marker, ...]:
        """The markers whose learned parts no attention uses."""
        used = [each.learned.marker.node for each in self.replacements if each.learned is not None]
        return tuple(marker for marker in self.markers if marker.node not in used)


def plan_rewrite(
    found: Sequence[AttentionSite | Rejection],
    config: NSAConfig,
    read_constant: ConstantReader | None = None,
    markers: Sequence[Marker] = (),
) -> RewritePlan:
    """Decides for each attention whether it becomes NSA.

    Nothing changes but this: where a decision hangs on a symbolic length while Dynamo compiles, the length is
    guarded, so that a call on the other side of `min_keys` compiles anew.

    Args:
        found: what `find_sites` returned.
        config: the configuration to rewrite for; what has learned parts is rewritten for theirs.
        read_constant: gives the values of tensors that nothing can change unnoticed, as `MaskProver` wants it.
        markers: what `find_markers` returned.

    Returns:
        The plan, a decision for each of `found`.
    """
    prover = MaskProver(read_constant)
    policy = _Policy(config, prover, LearnedPartsReader(found, markers))
    return RewritePlan(config, tuple(policy.decide(each) for each in found), tuple(markers), prover)


class _Policy:
    def __init__(self, config: NSAConfig, prover: MaskProver, learned: LearnedPartsReader) -> None:
        self._config = config
        self._prover = prover
        self._learned = learned
        self._flows: dict[fx.GraphModule, ActivationFlow] = {}

    def decide(self, found: AttentionSite | Rejection) -> Decision:
        if isinstance(found, Rejection):
            if found.place is None:
                raise ValueError(f"a rejection without a place is no finding: {found.sentence}")
            return Decision(found.place, rejection=found, marker=self._learned.marker_of(found.place.node))
        marker = self._learned.marker_of(found.node)
        visible = self._prover.visible_keys(found)
        if isinstance(visible, Rejection):
            return _declined(Decision(found.place, found, marker=marker), found, self._explained(found, visible))
        replacement = Replacement(found, _scale(found), visible, marker.config if marker else self._config)
        decision = Decision(found.place, found, visible.describe(), visible.proof, marker=marker)
        rejection = (
            self._not_causal(found)
            or _not_reachable(replacement)
            or _not_supported(replacement)
            or _not_wanted(replacement, has_gates=marker is not None)
        )
        if rejection is None and marker is not None:
            learned = self._learned.read(found, marker)
            if isinstance(learned, Rejection):
                rejection = learned
            else:
                replacement = dataclasses.replace(replacement, learned=learned)
        if rejection is not None:
            return _declined(decision, found, rejection)
        return dataclasses.replace(decision, replacement=replacement)

    def _explained(self, site: AttentionSite, rejection: Rejection) -> Rejection:
        """Says more precisely what the prover, which sees the masks alone, cannot tell apart."""
        if rejection.reason is Reason.BIDIRECTIONAL:
            return self._is_cross_attention(site) or rejection
        if rejection.reason is Reason.MASK_IS_INPUT and len(site.scope.calls) > 1:
            sentence = f"{site.scope.path} is run {len(site.scope.calls)} times, with masks that differ."
            return Rejection(Reason.SHARED_BODY, sentence, rejection.nodes)
        return rejection

    def _not_causal(self, site: AttentionSite) -> Rejection | None:
        """Declines a single query's cross-attention: nothing in its mask tells it from decoding."""
        return self._is_cross_attention(site) if same_size(site.query_length, 1) else None

    def _is_cross_attention(self, site: AttentionSite) -> Rejection | None:
        owner = site.scope.graph_module
        if owner not in self._flows:
            self._flows[owner] = ActivationFlow(owner)
        if self._flows[owner].relate(site) is not Relation.DIFFERENT_SEQUENCES:
            return None
        sentence = f"Keys ({site.key.node}) come from another sequence than queries ({site.query.node})."
        return Rejection(Reason.CROSS_ATTENTION, sentence, (site.query.node, site.key.node))


def _declined(decision: Decision, site: AttentionSite, rejection: Rejection) -> Decision:
    named = dataclasses.replace(rejection, nodes=rejection.nodes or (site.node,), place=site.place)
    return dataclasses.replace(decision, rejection=named)


def _not_reachable(replacement: Replacement) -> Rejection | None:
    """Declines sites in a body that what their mask is made of cannot be handed to."""
    visible = replacement.visible
    if visible.is_trivial:
        return None
    for scope in outward(replacement.site.scope, visible.scope):
        if not is_extensible(scope):
            call = scope.calls[0]
            sentence = f"What the mask is made of cannot be handed to {scope.path}, which {call} runs."
            return Rejection(Reason.SHARED_BODY, sentence, (call,))
    return None


def _not_supported(replacement: Replacement) -> Rejection | None:
    site, scale = replacement.site, replacement.scale
    if scale is not None and not math.isfinite(scale):
        parts = ", ".join(str(node) for node, _ in site.symbolic_scales) or str(site.scale)
        return Rejection(Reason.UNSUPPORTED_SCALE, f"The scale is {parts}, which is no number known beforehand.")
    dtype, device = dtype_of(site.node), device_of(site.query.node).type
    if dtype not in _DTYPES.get(device, _DTYPES["other"]):
        return Rejection(Reason.UNSUPPORTED_DTYPE, f"The dtype is {dtype} on {device}.")
    sizes = [_specialized(size) for size in (site.query.shape[3], site.value.shape[3])]
    if not all(map(math.isfinite, sizes)):
        return Rejection(Reason.UNSUPPORTED_HEAD_SIZE, "The head size is not known before the graph runs.")
    if device == "cuda" and max(sizes) > MAX_HEAD_SIZE:
        return Rejection(Reason.UNSUPPORTED_HEAD_SIZE, f"A head size of {max(sizes):g} is above {MAX_HEAD_SIZE}.")
    return None


def _not_wanted(replacement: Replacement, *, has_gates: bool) -> Rejection | None:
    site, config = replacement.site, replacement.config
    if config.combine == "gated" and not has_gates:
        return Rejection(Reason.NO_GATES, f"No gates are attached to {site.place.module or 'the model'}.")
    least = config.min_keys_resolved
    if not is_at_least(site.key_length, least):
        return Rejection(Reason.TOO_SHORT, f"{site.key_length} keys are fewer than min_keys={least}.")
    return None


def is_at_least(size: Size, least: int) -> bool:
    """Decides whether a size reaches a limit.

    A symbolic size may go either way.  While Dynamo compiles, the outcome for the sizes at hand is taken and
    guarded: a call on the other side compiles anew.  Elsewhere (an exported graph) there are no guards, and one
    graph serves all sizes; it is then taken to be reached wherever it can be.
    """
    if isinstance(size, int):
        return size >= least
    reached = size >= least
    if statically_known_true(reached):
        return True
    if TracingContext.try_get() is None:
        return not statically_known_true(size < least)
    try:
        return bool(reached)
    except GuardOnDataDependentSymNode:
        return True


def _scale(site: AttentionSite) -> float | None:
    """Returns the scale as a number, symbolic parts fixed; NaN where they cannot be."""
    if not site.symbolic_scales:
        return site.scale
    parts = [_specialized(node) ** power for node, power in site.symbolic_scales]
    return math.prod(parts, start=1.0 if site.scale is None else site.scale)


def _specialized(number_or_node: fx.Node | Size) -> float:
    """Fixes a symbolic number by a guard, where Dynamo compiles; NaN where it cannot be fixed."""
    number = fixed_number_of(number_or_node)
    return float(number) if number else math.nan
