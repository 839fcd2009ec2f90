"""Learned parts in a graph: markers bind a module's parameters, and are paired with the attentions they belong to.

A module with learned parts calls `torch.ops.nsa.bind` before its own forward.  The call lands in the same graph as
the module's attention, its arguments are ordinary inputs of that graph, and the rewrite erases it.
"""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from nsa_compile.config import NSAConfig
from nsa_compile.passes.branches import BRANCHES, BranchOperands, BranchReader
from nsa_compile.passes.hidden import HiddenStates
from nsa_compile.passes.metadata import owner_of, recorded_shape, scope_path
from nsa_compile.passes.scopes import walk_scopes
from nsa_compile.passes.sites import AttentionSite, Operand, Reason, Rejection, Scope


@dataclasses.dataclass(frozen=True, eq=False)
class Marker:
    """A call of `nsa::bind`.

    Attributes:
        node: the call.
        scope: the graph that holds it.
        module: dotted name of the module that the parts belong to.
        config: the configuration that they were made for.
        parts: name below the module's `nsa` -> the parameter.
        originals: name below the module -> the parameter of the model that branches have copies of.
    """

    node: fx.Node
    scope: Scope
    module: str
    config: NSAConfig
    parts: Mapping[str, fx.Node]
    originals: Mapping[str, fx.Node]

    def copies(self, branch: str) -> dict[fx.Node, fx.Node]:
        """Returns the model's own parameter -> the branch's."""
        return {original: self.parts[f"{branch}.{name}"] for name, original in self.originals.items()}


@dataclasses.dataclass(frozen=True)
class LearnedParts:
    """What an attention's learned parts are applied to.

    Attributes:
        marker: what binds them.
        hidden_states: the layer's input, as `[B, T, C]`.
        branches: branch -> its own keys and values; empty where all branches share them.
    """

    marker: Marker
    hidden_states: Operand
    branches: Mapping[str, BranchOperands]


def find_markers(graph_module: fx.GraphModule) -> list[Marker]:
    """Finds the markers of a graph and of the bodies of its higher-order operators."""
    return [
        _read(node, scope)
        for scope in walk_scopes(graph_module)
        for node in scope.graph_module.graph.nodes
        if node.op == "call_function" and node.target in (torch.ops.nsa.bind, torch.ops.nsa.bind.default)
    ]


class LearnedPartsReader:
    """Pairs attentions with markers, and finds in the graph what the learned parts are applied to.

    Args:
        found: all attentions of the graph.
        markers: all its markers.
    """

    def __init__(self, found: Sequence[AttentionSite | Rejection], markers: Sequence[Marker]) -> None:
        self._hidden_states = HiddenStates()
        self._branches = BranchReader()
        pairs = [(each.place.node, _marker_of(each, markers)) for each in found if each.place is not None]
        self._markers = {node: marker for node, marker in pairs if marker is not None}
        self._users = collections.Counter(marker.node for marker in self._markers.values())

    def marker_of(self, node: fx.Node) -> Marker | None:
        """Returns the marker of the module that an attention's node is in; None where no parts are attached."""
        return self._markers.get(node)

    def read(self, site: AttentionSite, marker: Marker) -> LearnedParts | Rejection:
        """Finds what a site's learned parts are applied to."""
        if self._users[marker.node] > 1:
            sentence = f"{marker.module or 'The model'} has several attentions, and learned parts for one."
            return Rejection(Reason.SHARED_LEARNED_PARTS, sentence, (site.node,))
        channels = int(recorded_shape(marker.parts["gates.hidden.weight"])[1])
        hidden_states = self._hidden_states.find(site, channels)
        if isinstance(hidden_states, Rejection):
            return hidden_states
        if marker.config.branch_kv == "shared":
            return LearnedParts(marker, hidden_states, {})
        branches: dict[str, BranchOperands] = {}
        for branch in BRANCHES:
            operands = self._branches.read(site, marker.copies(branch), hidden_states.node)
            if isinstance(operands, Rejection):
                return operands
            branches[branch] = operands
        return LearnedParts(marker, hidden_states, branches)


def _read(node: fx.Node, scope: Scope) -> Marker:
    values = dict(zip(("parts", "originals", "description"), node.args, strict=False)) | node.kwargs
    description = json.loads(str(values["description"]))
    return Marker(
        node=node,
        scope=scope,
        module=owner_of(node)[0],
        config=NSAConfig(**description["config"]),
        parts=dict(zip(description["parts"], _nodes(values["parts"]), strict=True)),
        originals=dict(zip(description["originals"], _nodes(values["originals"]), strict=True)),
    )


def _nodes(arguments: Any) -> list[fx.Node]:
    return [argument for argument in arguments if isinstance(argument, fx.Node)]


def _marker_of(attention: AttentionSite | Rejection, markers: Sequence[Marker]) -> Marker | None:
    """The last marker before an attention, in its graph, of the innermost module around it that has one."""
    place = attention.place
    if place is None:
        return None
    within, best, depth = scope_path(place.node), None, -1
    for marker in markers:
        around = scope_path(marker.node)
        is_around = within[: len(around)] == around and marker.scope.graph_module is place.scope.graph_module
        if is_around and len(around) >= depth and marker.node < place.node:
            best, depth = marker, len(around)
    return best
