"""`nsa_attention`: what it accepts, what it refuses and how it says so."""

import inspect
from typing import Any

import pytest
import torch

from nsa_compile import NSAConfig, errors, nsa_attention

CONFIG = NSAConfig(
    block_length=8, block_stride=4, selection_block=8, num_selected=4, num_initial=1, num_local=2, window=11
)
GATED = CONFIG.replace(combine="gated")
B, H, H_KV, T, S, D, D_V = 2, 4, 2, 20, 30, 8, 6
N_CMP = (S - 8) // 4 + 1


def _arguments(**changes) -> dict[str, Any]:
    """Arguments that are right, with some exchanged."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "query": torch.randn(B, H, T, D),
        "key": torch.randn(B, H_KV, S, D),
        "value": torch.randn(B, H_KV, S, D_V),
        "config": CONFIG,
    }
    return arguments | changes


def _gated(**changes) -> dict[str, Any]:
    return _arguments(config=GATED, gates=torch.rand(B, H, T, 3)) | changes


# Name -> error, part of the message, arguments.
REFUSED: dict[str, tuple[type[errors.NSAError], str, dict[str, Any]]] = {
    "query_rank": (errors.ShapeError, r"query has shape \[2, 20, 8\]", _arguments(query=torch.randn(B, T, D))),
    "key_rank": (errors.ShapeError, r"key has shape \[30, 8\]", _arguments(key=torch.randn(S, D))),
    "value_rank": (
        errors.ShapeError,
        r"value has shape \[2, 2, 30, 8, 1\]",
        _arguments(value=torch.randn(B, 2, S, D, 1)),
    ),
    "batch": (
        errors.ShapeError,
        r"key has shape \[3, 2, 30, 8\]; give \[2, 2, 30, 8\]",
        _arguments(key=torch.randn(3, 2, S, D)),
    ),
    "key_head_size": (errors.ShapeError, "with B and D of query", _arguments(key=torch.randn(B, H_KV, S, D + 1))),
    "value_length": (
        errors.ShapeError,
        "with B, H_kv and S of key",
        _arguments(value=torch.randn(B, H_KV, S - 1, D_V)),
    ),
    "value_heads": (errors.ShapeError, "with B, H_kv and S of key", _arguments(value=torch.randn(B, 1, S, D_V))),
    "no_head_size": (
        errors.ShapeError,
        "at least 1",
        _arguments(query=torch.randn(B, H, T, 0), key=torch.randn(B, H_KV, S, 0)),
    ),
    "heads": (
        errors.HeadCountError,
        "query has 4 heads and key 3; .* multiple .* transpose",
        _arguments(key=torch.randn(B, 3, S, D), value=torch.randn(B, 3, S, D_V)),
    ),
    "no_heads": (
        errors.HeadCountError,
        "key 0",
        _arguments(key=torch.randn(B, 0, S, D), value=torch.randn(B, 0, S, D_V)),
    ),
    "integers": (
        errors.DtypeError,
        "query is torch.int64; give float16",
        _arguments(query=torch.ones(B, H, T, D).long()),
    ),
    "float8": (
        errors.DtypeError,
        "query is torch.float8_e4m3fn",
        _arguments(query=torch.ones(B, H, T, D).to(torch.float8_e4m3fn)),
    ),
    "complex": (errors.DtypeError, "value is torch.complex64", _arguments(value=torch.ones(B, H_KV, S, D_V) * 1j)),
    "mixed": (
        errors.DtypeError,
        "key is torch.bfloat16 and query torch.float32; .* autocast",
        _arguments(key=torch.randn(B, H_KV, S, D).bfloat16()),
    ),
    "device": (
        errors.DeviceError,
        "value is on meta and query on cpu",
        _arguments(value=torch.randn(B, H_KV, S, D_V, device="meta")),
    ),
    "bounds_device": (
        errors.DeviceError,
        "last_key is on meta",
        _arguments(last_key=torch.ones(1, T, dtype=torch.int32, device="meta")),
    ),
    "bounds_dtype": (
        errors.DtypeError,
        "first_key is torch.float32; give int8",
        _arguments(first_key=torch.zeros(B, T)),
    ),
    "bounds_bool": (errors.DtypeError, "last_key is torch.bool", _arguments(last_key=torch.ones(B, T).bool())),
    "bounds_rank": (
        errors.ShapeError,
        r"last_key has shape \[20\]; give \[2, 20\]",
        _arguments(last_key=torch.arange(T)),
    ),
    "bounds_length": (
        errors.ShapeError,
        r"first_key has shape \[2, 30\]",
        _arguments(first_key=torch.zeros(B, S).long()),
    ),
    "bounds_batch": (
        errors.ShapeError,
        r"first_key has shape \[4, 20\]",
        _arguments(first_key=torch.zeros(4, T).long()),
    ),
    "valid_dtype": (
        errors.DtypeError,
        "key_valid is torch.int64; give bool",
        _arguments(key_valid=torch.ones(B, S).long()),
    ),
    "valid_shape": (
        errors.ShapeError,
        r"key_valid has shape \[2, 20\]; give \[2, 30\]",
        _arguments(key_valid=torch.ones(B, T).bool()),
    ),
    "scale_nan": (errors.ConfigError, "scale=nan", _arguments(scale=float("nan"))),
    "scale_infinite": (errors.ConfigError, "scale=inf", _arguments(scale=float("inf"))),
    "gates_missing": (errors.GatesError, "needs gates", _gated(gates=None)),
    "gates_in_joint_mode": (errors.GatesError, "leave them out", _arguments(gates=torch.rand(B, H, T, 3))),
    "gates_shape": (
        errors.ShapeError,
        r"gates has shape \[2, 20, 4, 3\]; give \[2, 4, 20, 3\]",
        _gated(gates=torch.rand(B, T, H, 3)),
    ),
    "gates_count": (errors.ShapeError, "compressed, selected, window", _gated(gates=torch.rand(B, H, T, 2))),
    "gates_dtype": (errors.DtypeError, "gates are torch.bool", _gated(gates=torch.ones(B, H, T, 3).bool())),
    "compressed_key_length": (
        errors.CompressionError,
        rf"compressed_key has shape \[2, 2, {N_CMP + 1}, 8\].* 30 keys make N_cmp = {N_CMP}",
        _arguments(compressed_key=torch.randn(B, H_KV, N_CMP + 1, D)),
    ),
    "compressed_value_size": (
        errors.CompressionError,
        "compressed_value has shape",
        _gated(compressed_key=torch.randn(B, H_KV, N_CMP, D), compressed_value=torch.randn(B, H_KV, N_CMP, D_V + 1)),
    ),
    "compressed_value_missing": (
        errors.CompressionError,
        "compressed_value is missing",
        _gated(compressed_key=torch.randn(B, H_KV, N_CMP, D)),
    ),
    "compressed_key_missing": (
        errors.CompressionError,
        "compressed_key is missing",
        _gated(compressed_value=torch.randn(B, H_KV, N_CMP, D_V)),
    ),
    "compressed_value_in_joint_mode": (
        errors.CompressionError,
        "leave it out",
        _arguments(compressed_value=torch.randn(B, H_KV, N_CMP, D_V)),
    ),
    "compressed_dtype": (
        errors.DtypeError,
        "compressed_key is torch.float64",
        _arguments(compressed_key=torch.randn(B, H_KV, N_CMP, D).double()),
    ),
    "window_key_shape": (errors.ShapeError, "window_key has shape", _gated(window_key=torch.randn(B, H_KV, T, D))),
    "window_value_shape": (
        errors.ShapeError,
        "window_value has shape",
        _gated(window_value=torch.randn(B, H_KV, S, D)),
    ),
    "window_key_in_joint_mode": (
        errors.ConfigError,
        "need combine='gated'",
        _arguments(window_key=torch.randn(B, H_KV, S, D)),
    ),
    "learned_compression": (
        errors.CompressionError,
        "compression='mlp' has learned parts",
        _gated(config=GATED.replace(compression="mlp")),
    ),
    "independent_branches": (
        errors.ConfigError,
        "give window_key and",
        _gated(config=GATED.replace(branch_kv="independent")),
    ),
    "config_type": (errors.ConfigError, "config is a dict; give an NSAConfig", _arguments(config={"window": 4})),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments = REFUSED[name]
    with pytest.raises(error, match=message) as raised:
        nsa_attention(**arguments)
    assert type(raised.value) is error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_stride": 5}, "block_stride=5 does not divide block_length=32"),
        ({"window": 0}, "window=0"),
        ({"combine": "both"}, "combine='both'"),
        ({"num_selected": 2}, "num_initial"),
    ],
)
def test_the_plain_operator_refuses_what_no_config_can_say(changes, message):
    arguments = _arguments()
    with pytest.raises(errors.ConfigError, match=message):
        torch.ops.nsa.attention(arguments["query"], arguments["key"], arguments["value"], **changes)


def test_refusals_leave_no_trace_in_later_calls():
    arguments = _arguments()
    expected = nsa_attention(**arguments)
    with pytest.raises(errors.GatesError):
        nsa_attention(**arguments, gates=torch.rand(B, H, T, 3))
    assert torch.equal(nsa_attention(**arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_accepts_floats(dtype):
    query, key, value = (_arguments()[name].to(dtype) for name in ("query", "key", "value"))
    output = nsa_attention(query, key, value, config=CONFIG)
    assert output.dtype == dtype
    assert output.shape == (B, H, T, D_V)
    exact = nsa_attention(query.double(), key.double(), value.double(), config=CONFIG)
    torch.testing.assert_close(output, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_accepts_bounds_of_any_integer_dtype_and_broadcasts_them(dtype):
    bounds = {"first_key": torch.arange(T)[None] // 2, "last_key": torch.arange(T)[None] + 3}
    expected = nsa_attention(**_arguments(**bounds))
    narrow = {name: each.to(dtype).expand(B, -1) for name, each in bounds.items()}
    assert torch.equal(nsa_attention(**_arguments(**narrow)), expected)


def test_padding_broadcasts():
    valid = torch.arange(S)[None] >= 7
    expected = nsa_attention(**_arguments(key_valid=valid.expand(B, -1)))
    assert torch.equal(nsa_attention(**_arguments(key_valid=valid)), expected)


def test_independent_branches_and_learned_compression():
    config = GATED.replace(compression="linear", branch_kv="independent")
    learned = {
        "compressed_key": torch.randn(B, H_KV, N_CMP, D),
        "compressed_value": torch.randn(B, H_KV, N_CMP, D_V),
        "window_key": torch.randn(B, H_KV, S, D),
        "window_value": torch.randn(B, H_KV, S, D_V),
    }
    only_window = torch.tensor([0.0, 0.0, 1.0]).expand(B, H, T, 3)
    output = nsa_attention(**_gated(config=config, gates=only_window, **learned))
    own = {"key": learned["window_key"], "value": learned["window_value"]}
    torch.testing.assert_close(output, nsa_attention(**_gated(gates=only_window, **own)))


def test_defaults_are_the_papers_joint():
    arguments = _arguments()
    arguments.pop("config")
    assert inspect.signature(nsa_attention).parameters["config"].default == NSAConfig()
    assert torch.equal(nsa_attention(**arguments), torch.ops.nsa.attention(*arguments.values()))


def test_traces_whole_with_dynamic_shapes():
    config = CONFIG

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def compiled(query, key, value, last_key):
        return nsa_attention(query, key, value, config=config, last_key=last_key, scale=0.5)

    for length in (20, 25, 31):
        arguments = _arguments(query=torch.randn(B, H, length, D), last_key=torch.arange(length)[None])
        config = arguments.pop("config")
        torch.testing.assert_close(compiled(**arguments), nsa_attention(**arguments, config=config, scale=0.5))


def test_a_mistake_in_compiled_code_names_itself():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(query, key, value):
        return nsa_attention(query, key, value, config=CONFIG)

    arguments = _arguments(key=torch.randn(B, 3, S, D), value=torch.randn(B, 3, S, D_V))
    with pytest.raises(Exception, match="query has 4 heads and key 3"):
        compiled(arguments["query"], arguments["key"], arguments["value"])
