"""Which indices a node depends on that are no dimensions of its tensor: inside torch.vmap, and inside predicates.

There one element stands for all, so an operation that cannot be followed must not pass for one number.
"""

import sympy
from torch import fx

from nsa_compile.passes.predicate.operations_views import level_symbol
from nsa_compile.passes.predicate.writes import target_name
from nsa_compile.passes.sites import Scope

_Indices = frozenset[sympy.Symbol]


class MappedIndices:
    """Remembers the indices of each node."""

    def __init__(self) -> None:
        self._indices: dict[fx.Node, _Indices] = {}
        self._has_maps: dict[fx.Graph, bool] = {}

    def assume(self, placeholder: fx.Node, indices: tuple[sympy.Symbol, ...]) -> None:
        """Makes a placeholder of a predicate depend on indices."""
        self._indices[placeholder] = frozenset(indices)
        self._has_maps[placeholder.graph] = True

    def of(self, node: fx.Node, scope: Scope) -> tuple[sympy.Symbol, ...]:
        """The indices that a node of a scope may depend on, in a fixed order."""
        if not self._is_mapped(scope):
            return ()
        pending = [(node, scope)]
        while pending:
            current, home = pending[-1]
            if current in self._indices:
                pending.pop()
                continue
            inputs = self._inputs(current, home)
            missing = [read for read in inputs if read[0] not in self._indices]
            if missing:
                pending.extend(missing)
            else:
                self._indices[current] = self._own(current, [read for read, _ in inputs])
        return tuple(sorted(self._indices[node], key=str))

    def _is_mapped(self, scope: Scope | None) -> bool:
        """Whether a scope, or one around it, maps anything at all."""
        while scope is not None:
            graph = scope.graph_module.graph
            if graph not in self._has_maps:
                self._has_maps[graph] = any(target_name(each) == "_add_batch_dim" for each in graph.nodes)
            if self._has_maps[graph]:
                return True
            scope = scope.parent
        return False

    def _inputs(self, node: fx.Node, scope: Scope) -> list[tuple[fx.Node, Scope]]:
        """What a node is computed from; the input of a body is computed from all that the body is called with."""
        if node.op == "placeholder" and scope.parent is not None:
            return [(call, scope.parent) for call in scope.calls]
        return [(read, scope) for read in node.all_input_nodes]

    def _own(self, node: fx.Node, inputs: list[fx.Node]) -> _Indices:
        indices = _Indices().union(*(self._indices[read] for read in inputs))
        name = target_name(node)
        if name == "_add_batch_dim":
            return indices | {level_symbol(node.args[2])}
        return indices - {level_symbol(node.args[1])} if name == "_remove_batch_dim" else indices
