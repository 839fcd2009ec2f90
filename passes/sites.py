"""What the passes say to each other: attention sites, where they are, and why some are left alone."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

Size = int | torch.SymInt
Shape = tuple[Size, ...]


class Reason(enum.Enum):
    """Why an attention stays dense; the value is a sentence for people, the name is for programs."""

    # The graph or the call cannot be read.
    UNKNOWN_SHAPES = "The graph carries no tensor shapes, so lengths and head counts are unknown."
    UNSUPPORTED_CALL = "The call's arguments are not ones that can be read from the graph."
    UNSUPPORTED_SHAPE = "The tensors' shapes are not those of batched multi-head attention."
    UNSUPPORTED_DTYPE = "The tensors' dtypes are not ones that the operator takes."
    UNSUPPORTED_HEAD_SIZE = "The head size is not one that the operator takes on this device."
    UNSUPPORTED_SCALE = "The scale of the scores is not a number that the graph fixes."
    SHARED_BODY = "The subgraph that holds the attention is run from several places that differ in what it needs."
    CUSTOM_GRADIENT = "The attention is inside a torch.autograd.Function, whose gradient is written by hand."
    FUNCTION_TRANSFORM = "The attention is inside torch.vmap or another function transform."
    FUSED_ATTENTION = "The attention is inside a fused operator that cannot be opened."
    UNKNOWN_SPELLING = "The scores before the softmax could not be read as a scaled product of queries and keys."
    # It is attention, but other mathematics than NSA's.
    DROPOUT = "Attention probabilities are dropped out in training, which NSA does not do."
    SOFTCAP = "The scores are soft-capped by tanh."
    ATTENTION_SINKS = "Extra columns (attention sinks) take part in the softmax."
    ATTENTION_WEIGHTS_USED = "The attention weights themselves are used, not only their product with the values."
    LOG_SUM_EXP_USED = "The log-sum-exp or the maximum of the scores is used, which NSA does not give."
    PROBABILITIES_CHANGED = "The attention weights are changed between the softmax and the product with the values."
    MULTIPLIED_SCORES = "The scores are multiplied by a tensor, which is neither a scale nor a mask."
    CROSS_ATTENTION = "Queries and keys come from different sequences."
    BIDIRECTIONAL = "Queries see keys after themselves, as in an encoder."
    # The mask.
    MASK_IS_INPUT = "The mask comes from outside the graph, so nothing about it can be proved."
    MASK_NOT_PROVED = "The mask's construction uses an operation that the prover cannot follow."
    MASK_NOT_INTERVAL = "The mask is understood, but the keys visible to a query are not one interval less padding."
    MUTATED_MASK = "The mask, or what it is made of, is written in place in a way that leaves its values unknown."
    UNSORTED_DOCUMENTS = "Documents are told apart by ids that are not proved to be in order."
    MASK_DEPENDS_ON_HEAD = "The mask differs between heads."
    ADDITIVE_BIAS = "The mask adds values other than 0 and minus infinity to the scores."
    ALIBI = "A bias that grows with distance (ALiBi) is added to the scores."
    LEARNED_BIAS = "A learned bias (relative positions) is added to the scores."
    ALREADY_SPARSE = "The mask is itself the outcome of a selection of keys (an indexer)."
    # Policy.
    TOO_SHORT = "There are fewer keys than min_keys, where dense attention is as good."
    NO_GATES = "combine='gated' needs learned gates, and none are attached to this module."
    # Learned parts are attached, and cannot be used here.
    NO_HIDDEN_STATES = "The layer's input, from which gates are computed, is not found in the graph."
    BRANCH_NOT_COPIED = "The way to the keys and values cannot be copied for branches of their own."
    SHARED_LEARNED_PARTS = "Several attentions are in a module that has learned parts for one."


class MaskKind(enum.Enum):
    """How a mask tensor is to be read."""

    ALLOWED = "allowed"  # bool, true where the key is visible
    BLOCKED = "blocked"  # bool, true where the key is hidden
    WEIGHT = "weight"  # a number, 1 where the key is visible, 0 where it is hidden
    GATE = "gate"  # likewise a number, that multiplies the scores: other masks hide what it makes 0
    ADDITIVE = "additive"  # float, 0 where the key is visible, minus infinity or nearly so where it is hidden


@dataclasses.dataclass(frozen=True)
class Predicate:
    """A graph over single positions that tells what is visible, such as flex_attention's mask_mod and score_mod.

    Attributes:
        scope: the graph.
        positions: its placeholders for batch, query head, query and key position.
        score: its placeholder for the score; None where there is none.
        blocks: a mask `[B|1, H|1, T, S]` in the site's graph whose blocks alone are visited, so that it has to be the
            same; None where no blocks are left out.
    """

    scope: "Scope"
    positions: tuple[fx.Node, ...]
    score: fx.Node | None = None
    blocks: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class Mask:
    """One mask of an attention; an attention's visible keys are those that all of its masks allow.

    Attributes:
        node: the mask tensor, in the site's graph, or the result of `predicate`.
        kind: how to read it.
        axes: for each of its dimensions, which of B (0), H (1), T (2) and S (3) it is, or is the product of; None
            where it broadcasts, right-aligned, to `[B, H, T, S]` as it is.
        factor: what an additive mask is multiplied by before it is added; -1 where it is subtracted.
        predicate: the graph that computes one element of the mask; None where the mask is a tensor.
    """

    node: fx.Node
    kind: MaskKind
    axes: tuple[tuple[int, ...], ...] | None = None
    factor: float = 1.0
    predicate: Predicate | None = None


@dataclasses.dataclass(frozen=True)
class Scope:
    """A graph, and how control reaches it: the root, or the body of a higher-order operator.

    Attributes:
        graph_module: owner of the graph.
        path: attribute path of `graph_module` from the root graph module; "" for the root.
        parent: the scope that runs the body; None for the root, and where callers are in different graphs.
        calls: nodes in `parent`'s graph that run the body, in order.
        arguments: placeholder of the body -> its node (or constant) in `parent`'s graph.  A placeholder to which
            the calls pass different things is absent.
    """

    graph_module: fx.GraphModule
    path: str = ""
    parent: "Scope | None" = None
    calls: tuple[fx.Node, ...] = ()
    arguments: Mapping[fx.Node, Any] = dataclasses.field(default_factory=dict, compare=False)

    def resolve(self, node: fx.Node) -> "tuple[Any, Scope]":
        """Follows a placeholder out of bodies to what it stands for.

        Returns:
            The node (or constant) and the scope it belongs to: `(node, self)` when nothing is to be followed.
        """
        scope = self
        while isinstance(node, fx.Node) and scope.parent is not None and node in scope.arguments:
            node, scope = scope.arguments[node], scope.parent
        return node, scope


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the model an attention is, for reports.

    Attributes:
        node: the node that computes the attention's output (for a softmax chain, the product with V).
        scope: the graph that holds it.
        spelling: how it is written, such as "F.scaled_dot_product_attention".
        module: dotted name of the owning module, "" for the compiled root.
        module_class: name of the owning module's class, "" where unknown.
        stack_trace: the user's source lines that made the node, "" where unknown.
        shapes: name of an operand -> its symbolic shape.
    """

    node: fx.Node
    scope: Scope
    spelling: str
    module: str = ""
    module_class: str = ""
    stack_trace: str = ""
    shapes: Mapping[str, Shape] = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation on the way to another layout: `target(tensor, *args)`.

    An operand among the arguments stands for what its own steps make of its node, and a branch for what its steps
    make of the tensor that this step is applied to.
    """

    target: Any
    args: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Branch:
    """Steps that start from the tensor of the step whose argument this is."""

    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor of the model, and how to bring it into the operator's layout, `[B, heads, length, D]`.

    Attributes:
        node: the tensor, in the site's graph.
        shape: the shape after the steps.
        steps: what to apply to it, in order; nothing where it has the layout already.
    """

    node: fx.Node
    shape: Shape
    steps: tuple[Step, ...] = ()


@dataclasses.dataclass(frozen=True)
class Factor:
    """A tensor, broadcastable to `[B, H, T, 1]`, that the queries are multiplied by, or divided."""

    operand: Operand
    is_divisor: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """An attention that is understood except for its masks: softmax(scale·Q Kᵀ + masks) V.

    Attributes:
        place: where it is; `place.node` is replaced when the site is rewritten.
        query: `[B, H, T, D]`.
        key: `[B, H_kv, S, D]`, before it is repeated for the query heads.
        value: `[B, H_kv, S, D_v]`.
        masks: all of them hold; empty where there is none.
        is_causal: query t sees keys 0…t (aligned top-left, as torch defines it), beside what the masks say.
        scale: factor of the scores; None for 1/sqrt(D).
        symbolic_scales: nodes of symbolic numbers that scale them too, with the power of each, 1 or -1.
        dtype: of what the operator gives.
        output: what brings the operator's `[B, H, T, D_v]` to the layout of `place.node`.
        factors: tensors that scale the scores of a query, beside `scale`.
    """

    place: Place
    query: Operand
    key: Operand
    value: Operand
    dtype: torch.dtype
    masks: tuple[Mask, ...] = ()
    is_causal: bool = False
    scale: float | None = None
    symbolic_scales: tuple[tuple[fx.Node, int], ...] = ()
    output: tuple[Step, ...] = ()
    factors: tuple[Factor, ...] = ()

    @property
    def node(self) -> fx.Node:
        """The node that computes the attention's output."""
        return self.place.node

    @property
    def scope(self) -> Scope:
        """The graph that holds the site."""
        return self.place.scope

    @property
    def batch(self) -> Size:
        """B."""
        return self.query.shape[0]

    @property
    def query_heads(self) -> Size:
        """H."""
        return self.query.shape[1]

    @property
    def key_heads(self) -> Size:
        """H_kv."""
        return self.key.shape[1]

    @property
    def query_length(self) -> Size:
        """T."""
        return self.query.shape[2]

    @property
    def key_length(self) -> Size:
        """S."""
        return self.key.shape[2]


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A typed refusal: the graph stays as it is there.

    Attributes:
        reason: the kind of refusal.
        sentence: what was found, naming the operation or the value at fault.
        nodes: the nodes at fault.
        place: where; None where the giver does not know (the prover), filled in by the plan.
    """

    reason: Reason
    sentence: str
    nodes: tuple[fx.Node, ...] = ()
    place: Place | None = None
