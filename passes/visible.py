"""The keys that each query of an attention may see, proved."""

import dataclasses
from collections.abc import Hashable

import sympy

from nsa_compile.passes.predicate.emission import is_plain_causal
from nsa_compile.passes.predicate.interval import Interval, Limit, Sizes
from nsa_compile.passes.predicate.tensor import B_INDEX, QUERY, Leaf
from nsa_compile.passes.predicate.words import text
from nsa_compile.passes.sites import Scope


@dataclasses.dataclass(frozen=True)
class VisibleKeys:
    """The keys that each query may see, proved.

    Attributes:
        interval: in terms of b, i and j.
        sizes: of the attention.
        scope: the graph that holds all the data which the interval needs; the interval's nodes go there.
        leaves: that data.
        binary: names of data that is taken to hold 0 and 1 alone, which the interval's nodes check.
    """

    interval: Interval
    sizes: Sizes
    scope: Scope = dataclasses.field(compare=False)
    leaves: tuple[Leaf, ...] = dataclasses.field(default=(), compare=False)
    binary: frozenset[str] = frozenset()

    @property
    def proof(self) -> tuple[str, ...]:
        """One sentence for each part of the mask."""
        checked = (f"{name} holds 0 and 1 alone, which is checked at every call" for name in sorted(self.binary))
        return (*self.interval.proof, *checked)

    @property
    def is_causal(self) -> bool:
        """Whether a query's last key is its own place (then no last keys are computed)."""
        return is_plain_causal(self.interval)

    @property
    def is_trivial(self) -> bool:
        """Whether nothing needs to be computed: plain causal, or a single query that sees every key."""
        interval = self.interval
        computed = interval.first or interval.keys or interval.queries or (interval.last and not self.is_causal)
        return not (computed or self.binary)

    def key(self) -> Hashable:
        """Equal for attentions whose intervals have the same nodes."""
        interval = self.interval
        parts = (interval.first, interval.last, interval.keys, interval.queries)
        return (*map(frozenset, parts), self.binary, self.sizes, id(self.scope.graph_module))

    def describe(self) -> str:
        """The mask in a few words, such as "causal, window 8, padding"."""
        interval = self.interval
        last = [bound.position for bound in interval.last if isinstance(bound, Limit)]
        words = ["causal" if self.is_causal else "all keys" if not last else "causal from a position"]
        for bound in interval.first:
            if not isinstance(bound, Limit):
                words.append("documents")
                continue
            widths = [sympy.expand(position - bound.position + 1) for position in last]
            constant = [width for width in widths if not width.free_symbols & {QUERY, B_INDEX}]
            words.append(f"window {constant[0]}" if constant else f"from key {text(bound.position)}")
        padding = "checked padding" if self.binary else "padding"
        words += [padding] if interval.keys else []
        words += ["padded queries"] if interval.queries else []
        return ", ".join(words)
