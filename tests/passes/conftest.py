"""The oracle of the mask tests: what a proof says, computed in the graph, against what the mask really holds."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional
from torch.utils import _pytree as pytree

from nsa_compile import NSAConfig
from nsa_compile.passes.find import find_sites
from nsa_compile.passes.mask import MaskProver, sizes_of
from nsa_compile.passes.metadata import recorded_value, tensor_of
from nsa_compile.passes.plan import Decision, plan_rewrite
from nsa_compile.passes.predicate.interval import Sizes
from nsa_compile.passes.predicate.tensor import size_expression
from nsa_compile.passes.rewrite import apply_plan
from nsa_compile.passes.scopes import walk_scopes
from nsa_compile.passes.sites import AttentionSite, Mask, MaskKind, Reason, Rejection, Scope
from nsa_compile.passes.visible import VisibleKeys

SDPA = (
    functional.scaled_dot_product_attention,
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclasses.dataclass
class Site:
    """An attention of a captured graph."""

    node: fx.Node
    scope: Scope
    masks: tuple[Mask, ...]
    is_causal: bool
    sizes: Sizes

    @property
    def mask(self) -> Mask:
        (mask,) = self.masks
        return mask


def sites_of(graph_module: fx.GraphModule) -> list[Site]:
    """The SDPA calls of a graph and of its bodies, in order."""
    found = []
    for scope in walk_scopes(graph_module):
        for node in scope.graph_module.graph.nodes:
            if node.target not in SDPA:
                continue
            arguments = dict(zip(_ARGUMENTS, node.args, strict=False)) | node.kwargs
            mask = arguments.get("attn_mask")
            query, key = tensor_of(arguments["query"]), tensor_of(arguments["key"])
            sizes = Sizes(*map(size_expression, (*query.shape[:3], key.shape[2])))
            masks = ()
            if mask is not None:
                kind = MaskKind.ALLOWED if tensor_of(mask).dtype == torch.bool else MaskKind.ADDITIVE
                masks = (Mask(mask, kind),)
            found.append(Site(node, scope, masks, bool(arguments.get("is_causal", False)), sizes))
    return found


class Recorder:
    """A backend that keeps the graphs it is given and their first inputs."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.inputs: list[list[Any]] = []

    def __call__(self, graph_module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs.append(graph_module)
        number = len(self.graphs) - 1

        def run(*args: Any) -> Any:
            if len(self.inputs) == number:
                self.inputs.append([_copy(arg) for arg in args])
            return graph_module.forward(*args)

        return run


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def capture(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None, grad: bool = False, **kwargs: Any
) -> Recorder:
    """Runs a function or module under Dynamo once."""
    torch._dynamo.reset()
    recorder = Recorder()
    with torch.set_grad_enabled(grad):
        torch.compile(function, backend=recorder, dynamic=dynamic)(*args, **kwargs)
    return recorder


class _Values(fx.Interpreter):
    """Runs a graph and keeps the values that some nodes have when a certain node runs."""

    def __init__(self, graph_module: fx.GraphModule, reader: fx.Node, wanted: Sequence[fx.Node]) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self._reader = reader
        self._wanted = wanted
        self.kept: dict[fx.Node, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        if node is self._reader:
            self.kept = {wanted: _copy(self.env[wanted]) for wanted in self._wanted}
        return super().run_node(node)


def run_graph(
    graph_module: fx.GraphModule, inputs: Sequence[Any], reader: fx.Node, wanted: Sequence[fx.Node]
) -> tuple[dict[fx.Node, Any], dict[Any, int]]:
    """What `reader` sees of nodes, and all sizes, for tensors as inputs; sizes are found from the tensors' shapes."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    sizes: dict[Any, int] = {}
    recorded = [tensor_of(node) for node in placeholders if tensor_of(node) is not None]
    for fake, real in zip(recorded, tensors, strict=True):
        for symbol, size in zip(fake.shape, real.shape, strict=True):
            sizes[size_expression(symbol)] = size
    remaining = iter(tensors)
    given = [
        next(remaining).clone() if tensor_of(node) is not None else sizes[size_expression(recorded_value(node))]
        for node in placeholders
    ]
    interpreter = _Values(graph_module, reader, wanted)
    interpreter.run(*given)
    return interpreter.kept, sizes


def allowed(values: torch.Tensor, mask: Mask, shape: tuple[int, ...]) -> torch.Tensor:
    """A mask's values as a bool mask `[B, H, T, S]` of the visible keys."""
    if mask.axes is not None:
        extended = [dim for dim, size in enumerate(values.shape) if size != 1]
        axes = [axis for dim in extended for axis in mask.axes[dim]]
        split = values.reshape([shape[axis] for axis in axes])
        order = sorted(range(len(axes)), key=axes.__getitem__)
        values = split.permute(order).reshape([shape[axis] if axis in axes else 1 for axis in range(4)])
    if mask.kind is MaskKind.ADDITIVE:
        values = values * mask.factor
        assert bool(((values == 0) | (values <= -10_000)).all())
        values = values == 0
    elif mask.kind is MaskKind.BLOCKED:
        values = values == 0
    return (values != 0).expand(shape)


def dense(first: Any, last: Any, valid: Any, is_causal: bool, queries: int, keys: int) -> torch.Tensor:
    """An interval and a padding vector as a bool mask `[B|1, 1, T, S]`, by nsa.md's definition."""
    place = torch.arange(keys)
    first = torch.zeros(1, queries, dtype=torch.int32) if first is None else first
    if last is None:
        last = torch.arange(queries)[None] if is_causal else torch.full((1, queries), keys - 1)
    assert first.dtype == torch.int32
    assert first.shape[1] == queries == last.shape[1]
    mask = (place >= first[..., None]) & (place <= last[..., None])
    if valid is not None:
        assert valid.dtype == torch.bool
        assert valid.shape[1] == keys
        mask = mask & valid[:, None, :]
    return mask[:, None]


@dataclasses.dataclass
class Proof:
    """A proved mask whose interval has been written into the graph."""

    site: Site
    visible: VisibleKeys
    emitted: Any
    root: fx.GraphModule

    def check(self, inputs: Sequence[Any]) -> None:
        """Asserts that, for these inputs, the interval is the mask."""
        ends = (self.emitted.first_key, self.emitted.last_key, self.emitted.key_valid)
        wanted = [*(node for node in ends if node is not None), *(mask.node for mask in self.site.masks)]
        values, sizes = run_graph(self.root, inputs, self.site.node, wanted)
        symbolic = (self.site.sizes.batch, self.site.sizes.heads, self.site.sizes.queries, self.site.sizes.keys)
        shape = tuple(int(size.subs(sizes)) for size in symbolic)
        interval = dense(*(values.get(node) for node in ends), self.emitted.is_causal, *shape[2:])
        expected = torch.ones(shape, dtype=torch.bool)
        if self.site.is_causal:
            expected = expected.tril()
        for mask in self.site.masks:
            expected = expected & allowed(values[mask.node], mask, shape)
        assert torch.equal(interval.expand(shape), expected), self.visible.proof

    @property
    def text(self) -> str:
        return self.visible.describe()


class Oracle:
    """Proves masks of captured graphs; one prover for each root graph."""

    def __init__(self) -> None:
        self.provers: dict[fx.GraphModule, MaskProver] = {}

    def sites(self, graph_module: fx.GraphModule) -> list[Site]:
        return sites_of(graph_module)

    @staticmethod
    def found_sites(graph_module: fx.GraphModule) -> list[Site]:
        """The attentions that the finder reads, however they are spelled; those that it declines are left out."""
        found = [site for site in find_sites(graph_module) if isinstance(site, AttentionSite)]
        return [Site(site.node, site.scope, site.masks, site.is_causal, sizes_of(site)) for site in found]

    def prove(self, graph_module: fx.GraphModule, site: Site, **options: Any) -> "Proof | Rejection":
        """Proves one site's mask and writes the interval into the graph that it belongs to."""
        prover = self.provers.setdefault(graph_module, MaskProver(**options))
        visible = prover.prove(site.masks, site.is_causal, site.sizes, site.scope, site.node)
        if isinstance(visible, Rejection):
            return visible
        before, scope = site.node, site.scope
        while scope.graph_module is not visible.scope.graph_module:
            before, scope = scope.calls[0], scope.parent
        emitted = prover.emit(visible, before, torch.device("cpu"))
        scope.graph_module.graph.lint()
        return Proof(site, visible, emitted, graph_module)

    def prove_program(
        self,
        program: Callable[..., torch.Tensor],
        *data: torch.Tensor,
        shape: tuple[int, int, int, int] = (2, 3, 7, 7),
        dynamic: bool | None = True,
        kind: MaskKind | None = None,
        **options: Any,
    ) -> "Proof | Rejection":
        """Captures attention whose mask `program(query, key, *data)` makes, and proves the mask.

        A proof is checked for the given data before it is returned.
        """
        batch, heads, queries, keys = shape
        query, key = torch.randn(batch, heads, queries, 4), torch.randn(batch, heads, keys, 4)

        def attend(query: torch.Tensor, key: torch.Tensor, *data: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(query, key, key, program(query, key, *data))

        recorder = capture(attend, query, key, *data, dynamic=dynamic)
        (graph_module,) = recorder.graphs
        (site,) = sites_of(graph_module)
        if kind is not None:
            site.masks = (Mask(site.mask.node, kind),)
        result = self.prove(graph_module, site, **options)
        if isinstance(result, Proof):
            result.check(recorder.inputs[0])
        return result

    @staticmethod
    def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Recorder:
        return capture(function, *args, **kwargs)

    @staticmethod
    def assert_declined(result: Any, reason: Reason) -> None:
        assert isinstance(result, Rejection), f"accepted: {result.text}"
        assert result.reason is reason, result
        assert result.sentence
        assert result.nodes


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="session")
def oracle_factory() -> type[Oracle]:
    """Makes oracles, for tests that run many examples in one call."""
    return Oracle


# Selection covers everything: joint NSA is dense attention, up to rounding.
COVERING = NSAConfig(block_length=4, block_stride=2, selection_block=8, num_selected=64, window=8, min_keys=0)


@dataclasses.dataclass
class Outcome:
    """What rewriting a model's graphs came to."""

    decisions: list[Decision]
    graphs: list[fx.GraphModule]
    before: list[str]
    output: Any = None
    expected: Any = None

    @property
    def reasons(self) -> list[str]:
        """Name of each decline's reason; "" for a rewritten attention."""
        return [each.rejection.reason.name if each.rejection else "" for each in self.decisions]

    @property
    def targets(self) -> list[Any]:
        """What all calls of all graphs and bodies call."""
        scopes = [scope for graph in self.graphs for scope in walk_scopes(graph)]
        return [node.target for scope in scopes for node in scope.graph_module.graph.nodes]

    def assert_rewritten(self, count: int = 1) -> None:
        """Asserts that every attention was rewritten, and that nothing but rounding changed."""
        assert self.reasons == [""] * count, [each.rejection for each in self.decisions]
        assert self.targets.count(torch.ops.nsa.attention.default) == count
        torch.testing.assert_close(self.output, self.expected, rtol=1e-4, atol=2e-5)

    def assert_declined(self, reason: Reason, count: int = 1) -> None:
        """Asserts that every attention was declined for a reason, and that the graphs are as they were."""
        assert self.reasons == [reason.name] * count, [each.rejection for each in self.decisions]
        assert [graph.print_readable(print_output=False) for graph in self.graphs] == self.before
        for decision in self.decisions:
            assert decision.rejection.sentence
            assert decision.rejection.nodes
            assert decision.rejection.place is not None


def rewrite(
    function: Callable[..., Any],
    *args: Any,
    config: NSAConfig = COVERING,
    dynamic: bool | None = None,
    gradients: bool = False,
    compiled: bool = False,
    seen: Callable[..., Any] = lambda output: output,
    **kwargs: Any,
) -> Outcome:
    """Compiles a model with its attentions rewritten and runs it, beside the model itself.

    Args:
        function: a module or function.
        config: the configuration; by default NSA equals dense attention.
        gradients: compare gradients of the inputs (and parameters) too.
        compiled: trace the rewritten graphs by AOTAutograd, rather than run them node by node.
        seen: what of the output to compare.
    """
    outcome = Outcome([], [], [])

    def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome.before.append(graph_module.print_readable(print_output=False))
        plan = plan_rewrite(find_sites(graph_module), config)
        apply_plan(graph_module, plan)
        outcome.decisions += plan.decisions
        outcome.graphs.append(graph_module)
        return aot_eager(graph_module, example_inputs) if compiled else graph_module.forward

    torch._dynamo.reset()
    rewritten = torch.compile(function, backend=backend, dynamic=dynamic)
    for name, call in (("expected", function), ("output", rewritten)):
        inputs = copy.deepcopy((args, kwargs))
        with contextlib.nullcontext() if gradients else torch.no_grad():
            result = seen(call(*inputs[0], **inputs[1]))
        setattr(outcome, name, (result, _gradients(function, inputs, result)) if gradients else result)
    return outcome


def _gradients(function: Callable[..., Any], inputs: Any, result: torch.Tensor) -> list[torch.Tensor]:
    given = [each for each in pytree.tree_leaves(inputs) if isinstance(each, torch.Tensor) and each.requires_grad]
    given += list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    weight = torch.linspace(-1, 1, result.numel()).view_as(result)
    return list(torch.autograd.grad((result * weight).sum(), given))


class Rewriting:
    """Compiles models with their attentions rewritten."""

    covering = COVERING
    rewrite = staticmethod(rewrite)


@pytest.fixture(scope="session")
def rewriting() -> type[Rewriting]:
    return Rewriting
