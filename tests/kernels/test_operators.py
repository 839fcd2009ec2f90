"""The operators as torch sees them: schemas, fakes, gradients, compilation, export, autocast, FLOP counts."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from nsa_compile.errors import NSAError, SecondDerivativeError
from nsa_compile.kernels import dispatch, operators

SIZES: dict[str, Any] = {
    "block_length": 8,
    "block_stride": 4,
    "selection_block": 8,
    "num_selected": 4,
    "num_initial": 1,
    "num_local": 2,
    "window": 11,
}
nsa = torch.ops.nsa


def _operator_arguments(name, inputs, bounds):
    """Positional and keyword arguments of an operator, with valid lists, for `inputs`."""
    query, key, value = inputs.tensors
    batch, kv_heads, num_keys, _ = key.shape
    num_queries = query.shape[2]
    compression = {"block_length": 8, "block_stride": 4}
    num_compressed = (num_keys - 8) // 4 + 1
    sight: list = [None, None]
    valid = compressed_valid = block_valid = None
    if bounds == "given":
        last = torch.arange(num_queries, dtype=torch.int32).expand(batch, -1).contiguous()
        sight = [(last - 30).contiguous(), last]
        valid = torch.ones(batch, num_keys, dtype=torch.bool)
        compressed_valid = torch.ones(batch, num_compressed, dtype=torch.bool)
        block_valid = torch.ones(batch, -(-num_keys // 8), dtype=torch.bool)
    compressed = [each.detach()[:, :, :num_compressed].requires_grad_() for each in (key, value)]
    attributes = {"is_causal": True, "scale": 0.3}
    if name == "select_blocks":
        sizes = {size: SIZES[size] for size in ("selection_block", "num_selected", "num_initial", "num_local")}
        return [query, compressed[0], None, *sight, compressed_valid, block_valid], (
            attributes | compression | sizes | {"num_keys": num_keys}
        )
    lists = torch.tensor([0, 2, 3, -1], dtype=torch.int32).expand(batch, kv_heads, num_queries, 4).contiguous()
    forced = {"num_initial": 1, "num_local": 0}
    return {
        "compressed_attention": (
            [query, *compressed, *sight, compressed_valid],
            attributes | compression | {"num_keys": num_keys},
        ),
        "selected_attention": (
            [query, key, value, lists, *sight, valid],
            attributes | {"selection_block": 8} | forced,
        ),
        "window_attention": ([query, key, value, *sight, valid], attributes | {"window": 11}),
        "joint_attention": (
            [query, key, value, lists, *sight, valid],
            attributes | {"selection_block": 8, "window": 11} | forced,
        ),
    }[name]


OPERATORS = ("select_blocks", *operators.BRANCH_OPERATORS)


@pytest.mark.parametrize("bounds", ["missing", "given"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(draw_inputs, name, transposed, bounds):
    inputs = draw_inputs(num_queries=40, value_size=6, transposed=transposed)
    positional, keywords = _operator_arguments(name, inputs, bounds)
    torch.library.opcheck(getattr(nsa, name).default, positional, keywords)
    if name == "select_blocks":
        return
    with torch.no_grad():
        output, lse = getattr(nsa, name)(*positional, **keywords)
    # Without requires_grad: second derivatives are refused.
    positional = [each.detach() if isinstance(each, torch.Tensor) else each for each in positional]
    delta = torch.randn_like(lse)
    backward = [torch.randn_like(output), *positional, delta, lse]
    torch.library.opcheck(nsa.output_dot_gradient.default, (output.detach(), backward[0]))
    torch.library.opcheck(getattr(nsa, f"{name}_backward").default, backward, keywords)


def test_opcheck_of_the_listed_share_of_joint_attention(draw_inputs):
    inputs = draw_inputs(num_queries=40, value_size=6, requires_grad=False)
    positional, keywords = _operator_arguments("joint_attention", inputs, "missing")
    torch.library.opcheck(nsa.joint_listed.default, positional, keywords)


@pytest.mark.parametrize("combine", ["joint", "gated"])
def test_opcheck_of_the_composite(draw_inputs, combine):
    inputs = draw_inputs("holes", num_queries=40, value_size=6)
    gates = torch.rand(2, 4, 40, 3).requires_grad_() if combine == "gated" else None
    keywords = {"gates": gates, "combine": combine} | inputs.sight | SIZES
    torch.library.opcheck(nsa.attention.default, inputs.tensors, keywords)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_results_are_fresh_contiguous_and_as_the_fake_says(draw_inputs, name, dtype):
    inputs = draw_inputs(num_queries=40, value_size=6, dtype=dtype, transposed=True, requires_grad=False)
    positional, keywords = _operator_arguments(name, inputs, "missing")

    def on_meta(each):
        return each.to("meta") if isinstance(each, torch.Tensor) else each

    def check(operator, arguments):
        with torch.no_grad():
            real, fake = operator(*arguments, **keywords), operator(*map(on_meta, arguments), **keywords)
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for position, (left, right) in enumerate(pairs):
            is_output = operator in outputs and position == 0  # in memory [B, T, H, D_v]
            assert (left.transpose(1, 2) if is_output else left).is_contiguous()
            assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())
        return real

    outputs = [getattr(nsa, branch) for branch in operators.BRANCH_OPERATORS]
    real = check(getattr(nsa, name), positional)
    if name != "select_blocks":
        assert real[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        grad = torch.randn_like(real[0])
        delta = nsa.output_dot_gradient(real[0], grad)
        assert (delta.shape, delta.dtype, delta.stride()) == (real[1].shape, real[1].dtype, real[1].stride())
        check(getattr(nsa, f"{name}_backward"), [grad, *positional, delta, real[1]])


@pytest.mark.parametrize("name", OPERATORS)
def test_no_result_holds_uninitialised_memory(draw_inputs, name):
    """torch.empty gives NaN in deterministic mode: whatever is not written shows."""
    inputs = draw_inputs(num_queries=40, value_size=6)
    positional, keywords = _operator_arguments(name, inputs, "given")

    def run():
        with torch.no_grad():
            results = getattr(nsa, name)(*positional, **keywords)
            if name == "select_blocks":
                return [results]
            backward = getattr(nsa, f"{name}_backward")
            output, lse = results
            grad = torch.ones_like(output)
            delta = nsa.output_dot_gradient(output, grad)
            return [*results, delta, *backward(grad, *positional, delta, lse, **keywords)]

    plain = run()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for left, right in zip(plain, poisoned, strict=True):
        assert torch.equal(left, right)


def test_lists_and_log_sum_exps_have_no_gradient(draw_inputs):
    inputs = draw_inputs(num_queries=40)
    positional, keywords = _operator_arguments("select_blocks", inputs, "missing")
    assert not nsa.select_blocks(*positional, **keywords).requires_grad
    positional, keywords = _operator_arguments("window_attention", inputs, "missing")
    output, lse = nsa.window_attention(*positional, **keywords)
    assert output.requires_grad
    assert not lse.requires_grad


def test_second_derivatives_are_refused(draw_inputs):
    inputs = draw_inputs(num_queries=40)
    output = nsa.attention(*inputs.tensors, **SIZES)
    (grad,) = torch.autograd.grad(output.square().sum(), inputs.query, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="create_graph"):
        grad.sum().backward()
    assert issubclass(SecondDerivativeError, NSAError)


def test_gradient_of_an_expanded_tensor(draw_inputs):
    """`sum()` hands back a gradient of strides 0."""
    inputs = draw_inputs(num_queries=40)
    output = nsa.attention(*inputs.tensors, **SIZES)
    expanded = torch.autograd.grad(output.sum(), inputs.tensors, retain_graph=True)
    for left, right in zip(expanded, torch.autograd.grad(output, inputs.tensors, torch.ones_like(output)), strict=True):
        assert torch.equal(left, right)


class Model(torch.nn.Module):
    """Both modes around pointwise operations, with everything that may be given."""

    def forward(self, query, key, value, gates, key_valid, first_key):
        gated = nsa.attention(query, key, value, gates=gates.sigmoid(), combine="gated", **SIZES)
        joint = nsa.attention(query.relu(), key, value, key_valid=key_valid, first_key=first_key, **SIZES)
        return (gated + joint).sin()


def _model_inputs(draw_inputs, length):
    inputs = draw_inputs("holes", num_queries=length, value_size=6, seed=length)
    gates = torch.randn(2, 4, length, 3).requires_grad_()
    return *inputs.tensors, gates, inputs.sight["key_valid"], torch.arange(length)[None] // 20 * 20


def _check_same(compiled, arguments):
    leaves = [each for each in arguments if each.requires_grad]
    expected = Model()(*arguments)
    given = compiled(*arguments)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    for left, right in zip(
        torch.autograd.grad(given.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dynamic", "most_graphs"), [(True, 1), (None, 2)])
def test_compiles_whole_with_one_recompilation_at_most(draw_inputs, dynamic, most_graphs):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Model(), backend=counter, fullgraph=True, dynamic=dynamic)
    for length in (40, 63, 111, 32):
        _check_same(compiled, _model_inputs(draw_inputs, length))
    assert counter.frame_count <= most_graphs
    # The composite is one node for each call, so that it can be found in the graph.
    calls = [node.target for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert sum(target in (nsa.attention, nsa.attention.default) for target in calls) == 2


def test_inductor_forward_and_backward(draw_inputs, relative_error, tmp_path, monkeypatch):
    # Inductor's caches know an operator by name: they would serve code made for an earlier version of it.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def gated(query, key, value, gates):
        return nsa.attention(query, key, value, gates=gates.sigmoid(), combine="gated", **SIZES)

    compiled = torch.compile(gated, fullgraph=True, dynamic=True)
    for length in (63, 40):
        leaves = _model_inputs(draw_inputs, length)[:4]
        given, expected = compiled(*leaves), gated(*leaves)
        assert relative_error(given, expected) < 1e-6
        gradients = (torch.autograd.grad(each.sum(), leaves) for each in (given, expected))
        assert all(relative_error(left, right) < 1e-5 for left, right in zip(*gradients, strict=True))


def test_decoding_with_a_growing_cache_compiles_once(draw_inputs):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(query, key, value, last_key):
        return nsa.attention(query, key, value, last_key=last_key, **SIZES)

    for num_keys in (40, 41, 47, 100):
        inputs = draw_inputs(num_queries=1, num_keys=num_keys, requires_grad=False)
        last_key = torch.full((1, 1), num_keys - 1)
        expected = nsa.attention(*inputs.tensors, last_key=last_key, **SIZES)
        torch.testing.assert_close(step(*inputs.tensors, last_key), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_export_round_trip(draw_inputs, transposed):
    def arguments(length):
        query, key, value, *rest = _model_inputs(draw_inputs, length)
        if transposed:
            query, key, value = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (query, key, value))
        return tuple(each.detach() for each in (query, key, value, *rest))

    length = torch.export.Dim("length", min=32, max=4096)
    shapes = ({2: length},) * 4 + ({1: length},) * 2
    exported = torch.export.export(Model(), arguments(63), dynamic_shapes=shapes)
    assert sum(node.target is nsa.attention.default for node in exported.graph.nodes) == 2
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    decomposed = loaded.run_decompositions()
    targets = [node.target for node in decomposed.graph.nodes]
    assert nsa.attention.default not in targets
    assert nsa.joint_attention.default in targets
    for program in (loaded, decomposed):
        for size in (63, 40):
            inputs = arguments(size)
            torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


def test_autocast_casts_as_dense_attention_does(draw_inputs):
    inputs = draw_inputs(num_queries=63)
    query, key, value = inputs.tensors
    gates = torch.rand(2, 4, 63, 3)
    half = [each.bfloat16() for each in inputs.tensors]

    def gated(query, key, value):
        return nsa.attention(query, key, value, gates=gates, combine="gated", **SIZES)

    with torch.autocast("cpu", torch.bfloat16):
        dense = torch.nn.functional.scaled_dot_product_attention(query, query, query.bfloat16())
        outputs = [gated(query, key.bfloat16(), value), torch.compile(gated, backend="aot_eager")(query, key, value)]
    # Gates stay float32: they are multiplied in float32 anyway.
    for output in outputs:
        assert output.dtype == dense.dtype == torch.bfloat16
        assert torch.equal(output, gated(*half))
    (grad,) = torch.autograd.grad(outputs[0].sum(), query)
    assert grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(draw_inputs):
    inputs = draw_inputs(num_queries=40, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert nsa.attention(*inputs.tensors, **SIZES).dtype == torch.float64


def test_flop_counts():
    query, key, value = (
        torch.randn(2, heads, 96, size, requires_grad=True) for heads, size in ((4, 8), (2, 8), (2, 6))
    )
    pairs = 2 * 4 * 96  # B · H · T
    compressed = (96 - 8) // 4 + 1
    forward = {
        "compressed_attention": 2 * pairs * compressed * (8 + 6),
        "select_blocks": 2 * pairs * compressed * 8,
        "selected_attention": 2 * pairs * 4 * 8 * (8 + 6),
        "window_attention": 2 * pairs * 11 * (8 + 6),
    }
    with FlopCounterMode(display=False) as counter:
        output = nsa.attention(query, key, value, gates=torch.rand(2, 4, 96, 3), combine="gated", **SIZES)
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    assert counts == {f"nsa.{name}": count for name, count in forward.items()}
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    del forward["select_blocks"]
    expected = {f"nsa.{name}_backward": count // (8 + 6) * (3 * 8 + 2 * 6) for name, count in forward.items()}
    assert {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()} == expected
    with FlopCounterMode(display=False) as counter:
        nsa.attention(query, key, value, **SIZES)
    assert counter.get_total_flops() == 2 * pairs * compressed * 8 + 2 * pairs * (4 * 8 + 11) * (8 + 6)


def test_every_operator_has_an_aten_implementation():
    for name in OPERATORS:
        assert callable(dispatch.blockwise_function(name))
    for name in operators.BRANCH_OPERATORS:
        assert callable(dispatch.blockwise_function(f"{name}_backward"))
    assert dispatch.implementation("window_attention", torch.empty(0)) is dispatch.blockwise_function(
        "window_attention"
    )


def test_kernels_are_launched_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.append(torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(operators, "on_device", lambda _: dispatch.on_device(torch.device("cuda", 1)))
    monkeypatch.setattr(operators, "implementation", lambda name, query: lambda *_, **__: list(entered))
    compute = operators._dispatched("window_attention_backward", query_position=1)
    assert compute(torch.empty(0), torch.empty(0)) == [torch.device("cuda", 1)]
    assert entered[-1].type == "cpu"
    with dispatch.on_device(torch.device("cpu")):
        assert len(entered) == 2
