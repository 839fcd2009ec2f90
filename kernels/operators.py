"""The operators `torch.ops.nsa.*`: schemas, fakes, gradients, autocast, FLOP counts.

Importing this module registers them, once.

`nsa::attention` is a composite: one node in Dynamo and export graphs, and below them the calls of
kernels/attention.py.  The others are opaque; each attention branch X has `X_backward`, an operator too.
`joint_listed` stands only in Inductor's graphs, below autograd: the part of `joint_attention` before its last kernel.
`output_dot_gradient` is what all four gradients need of the output, delta: Inductor makes it with what else reads both.
`gated_attention`, for long inference alone, is all of gated attention that follows the compressed branch: its output
and those of `selected_attention` and `window_attention`, summed by `gates` `[B, H, T, 3]`; it has no gradient.

Letters and definitions: B batch, H query heads, H_kv KV heads, T queries, S keys, D and D_v head sizes,
l `block_length`, d `block_stride`, l' `selection_block`, n `num_selected`, w `window`, N_cmp compressed tokens,
N_blk selection blocks.

Conventions of all opaque operators:
    - Tensors may have any strides with a contiguous last dimension.  Results are fresh and contiguous, but a branch's
      output `[B, H, T, D_v]` lies in memory as `[B, T, H, D_v]`: what models want next; gates, sum and transpose then
      run in one order, and Inductor can fuse them behind the attention.
    - `first_key` and `last_key` are both None (then 0, and t if `is_causal` else S − 1) or both int32 `[B, T]`,
      contiguous; values may lie outside 0 … S − 1.  A query with first > last sees nothing.
    - Sums are float32, float64 for float64; outputs have the query's dtype.
    - `num_initial` and `num_local` of the attentions over lists promise that every list holds those forced blocks, as
      `select_blocks` makes them; kernels may then read them densely.  0 promises nothing.
    - `delta` `[B, H, T]` is Σ over D_v of output · its gradient, dtype as `lse`.
    - `lse` `[B, H, T]` is the natural logarithm, float32 (float64 for float64), not differentiable.  A row that
      sees nothing has lse −inf, output 0 and gradient 0.

Reference: arXiv 2502.11089, section 3.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa_compile.errors import NSAError, SecondDerivativeError
from nsa_compile.kernels import learned as _register_learned_parts  # noqa: F401  (importing registers its operators)
from nsa_compile.kernels import requirement as _register_requirement  # noqa: F401
from nsa_compile.kernels.attention import attention
from nsa_compile.kernels.compression import sum_dtype
from nsa_compile.kernels.dispatch import implementation, on_device
from nsa_compile.kernels.flops import register_flop_formulas

_ATTENTION = (
    "attention(Tensor query, Tensor key, Tensor value, *, Tensor? gates=None, Tensor? compressed_key=None, "
    "Tensor? compressed_value=None, Tensor? window_key=None, Tensor? window_value=None, Tensor? first_key=None, "
    "Tensor? last_key=None, Tensor? key_valid=None, bool is_causal=True, float? scale=None, int block_length=32, "
    "int block_stride=16, int selection_block=64, int num_selected=16, int num_initial=1, int num_local=2, "
    'int window=512, str combine="joint") -> Tensor'
)
# block_indices: [B, H_kv, T, n] int32, ascending, −1 padded.
_SELECT_BLOCKS = (
    "select_blocks(Tensor query, Tensor compressed_key, Tensor? lse, Tensor? first_key, Tensor? last_key, "
    "Tensor? compressed_valid, Tensor? block_valid, *, bool is_causal, float scale, int block_length, "
    "int block_stride, int selection_block, int num_selected, int num_initial, int num_local, SymInt num_keys) "
    "-> Tensor"
)
_GATED_ATTENTION = (
    "gated_attention(Tensor query, Tensor key, Tensor value, Tensor block_indices, Tensor window_key, "
    "Tensor window_value, Tensor? first_key, Tensor? last_key, Tensor? key_valid, Tensor compressed_output, "
    "Tensor gates, *, bool is_causal, float scale, int selection_block, int window, int num_initial=0, "
    "int num_local=0) -> Tensor"
)
# Branch -> its tensors after query, and its attributes.
_BRANCHES = {
    "compressed_attention": (
        "Tensor compressed_key, Tensor compressed_value, Tensor? first_key, Tensor? last_key, Tensor? compressed_valid",
        "bool is_causal, float scale, int block_length, int block_stride, SymInt num_keys",
    ),
    "selected_attention": (
        "Tensor key, Tensor value, Tensor block_indices, Tensor? first_key, Tensor? last_key, Tensor? key_valid",
        "bool is_causal, float scale, int selection_block, int num_initial=0, int num_local=0",
    ),
    "window_attention": (
        "Tensor key, Tensor value, Tensor? first_key, Tensor? last_key, Tensor? key_valid",
        "bool is_causal, float scale, int window",
    ),
    "joint_attention": (
        "Tensor key, Tensor value, Tensor block_indices, Tensor? first_key, Tensor? last_key, Tensor? key_valid",
        "bool is_causal, float scale, int selection_block, int window, int num_initial=0, int num_local=0",
    ),
}
BRANCH_OPERATORS = tuple(_BRANCHES)
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU"}


def _register() -> torch.library.Library:
    library = torch.library.Library("nsa", "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    library.define(_ATTENTION, tags=torch.Tag.pt2_compliant_tag)
    library.impl("attention", attention, "CompositeImplicitAutograd")
    for device, key in _AUTOCAST_KEYS.items():
        library.impl("attention", _autocast_attention(device), key)

    library.define(_SELECT_BLOCKS, tags=tags)
    library.impl("select_blocks", _dispatched("select_blocks", query_position=0), "CompositeExplicitAutograd")
    torch.library.register_fake("nsa::select_blocks", _fake_select_blocks, lib=library)
    torch.library.register_autograd("nsa::select_blocks", _no_gradient, setup_context=_save_nothing, lib=library)

    library.define("output_dot_gradient(Tensor output, Tensor grad_output) -> Tensor", tags=tags)
    library.impl(
        "output_dot_gradient", _dispatched("output_dot_gradient", query_position=0), "CompositeExplicitAutograd"
    )
    torch.library.register_fake("nsa::output_dot_gradient", _fake_delta, lib=library)
    torch.library.register_autograd(
        "nsa::output_dot_gradient", _refuse_second_derivative, setup_context=_save_nothing, lib=library
    )

    for name, (tensors, attributes) in _BRANCHES.items():
        backward = f"{name}_backward"
        library.define(f"{name}(Tensor query, {tensors}, *, {attributes}) -> (Tensor output, Tensor lse)", tags=tags)
        library.define(
            f"{backward}(Tensor grad_output, Tensor query, {tensors}, Tensor delta, Tensor lse, *, {attributes}) "
            "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
            tags=tags,
        )
        library.impl(name, _dispatched(name, query_position=0), "CompositeExplicitAutograd")
        library.impl(backward, _dispatched(backward, query_position=1), "CompositeExplicitAutograd")
        torch.library.register_fake(f"nsa::{name}", _fake_branch, lib=library)
        torch.library.register_fake(f"nsa::{backward}", _fake_branch_backward, lib=library)
        torch.library.register_autograd(
            f"nsa::{name}", _branch_gradient(backward), setup_context=_save_for_gradient, lib=library
        )
        torch.library.register_autograd(
            f"nsa::{backward}", _refuse_second_derivative, setup_context=_save_nothing, lib=library
        )

    library.define(_GATED_ATTENTION, tags=tags)
    library.impl("gated_attention", _dispatched("gated_attention", query_position=0), "CompositeExplicitAutograd")
    torch.library.register_fake("nsa::gated_attention", _fake_output, lib=library)
    torch.library.register_autograd(
        "nsa::gated_attention", _refuse_derivative, setup_context=_save_nothing, lib=library
    )

    tensors, attributes = _BRANCHES["joint_attention"]
    library.define(f"joint_listed(Tensor query, {tensors}, *, {attributes}) -> (Tensor output, Tensor lse)", tags=tags)
    library.impl("joint_listed", _dispatched("joint_listed", query_position=0), "CompositeExplicitAutograd")
    torch.library.register_fake("nsa::joint_listed", _fake_branch, lib=library)
    return library


def _dispatched(name: str, query_position: int) -> Callable[..., Any]:
    def compute(*tensors: Tensor | None, **attributes: Any) -> Any:
        query: Any = tensors[query_position]
        with on_device(query.device):
            return implementation(name, query)(*tensors, **attributes)

    return compute


def _autocast_attention(device: str) -> Callable[..., Tensor]:
    """Casts as autocast casts scaled_dot_product_attention; gates keep their dtype, as they are used in float32."""

    def cast_and_attend(
        query: Tensor, key: Tensor, value: Tensor, *, gates: Tensor | None = None, **rest: Any
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(each: Any) -> Any:
            lower = isinstance(each, Tensor) and each.is_floating_point() and each.dtype != torch.float64
            return each.to(dtype) if lower and each.device.type == device else each

        with torch.autocast(device, enabled=False):
            return torch.ops.nsa.attention(
                cast(query), cast(key), cast(value), gates=gates, **{name: cast(each) for name, each in rest.items()}
            )

    return cast_and_attend


def _fake_select_blocks(
    query: Tensor, compressed_key: Tensor, *_: Tensor | None, num_selected: int, **__: Any
) -> Tensor:
    size = (query.shape[0], compressed_key.shape[1], query.shape[2], num_selected)
    return query.new_empty(size, dtype=torch.int32)


def _fake_output(query: Tensor, _key: Tensor, value: Tensor, *_: Tensor | None, **__: Any) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3])).transpose(1, 2)


def _fake_delta(output: Tensor, _grad_output: Tensor) -> Tensor:
    return output.new_empty(output.shape[:3], dtype=sum_dtype(output))


def _fake_branch(query: Tensor, key: Tensor, value: Tensor, *_: Tensor | None, **__: Any) -> tuple[Tensor, Tensor]:
    output = _fake_output(query, key, value)
    return output, query.new_empty(query.shape[:3], dtype=sum_dtype(query))


def _fake_branch_backward(
    _grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Tensor | None, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_for_gradient(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.attributes = keyword_only_inputs
    ctx.mark_non_differentiable(output[1])


def _branch_gradient(backward: str) -> Callable[..., tuple[Tensor | None, ...]]:
    def gradient(ctx: Any, grad_output: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output.stride(-1) != 1:
            grad_output = grad_output.contiguous()
        *inputs, output, lse = ctx.saved_tensors  # read once: checkpointing hands them out once
        delta = torch.ops.nsa.output_dot_gradient(output, grad_output)
        gradients = getattr(torch.ops.nsa, backward)(grad_output, *inputs, delta, lse, **ctx.attributes)
        num_others = len(inputs) - 3  # query, key, value
        return (*gradients, *[None] * num_others)

    return gradient


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any, **_: Any) -> None:
    ctx.num_inputs = len(inputs)
    if isinstance(output, Tensor) and not output.is_floating_point():
        ctx.mark_non_differentiable(output)


def _no_gradient(ctx: Any, _grad_output: Tensor | None) -> tuple[None, ...]:
    return (None,) * ctx.num_inputs


def _refuse_derivative(_ctx: Any, *_: Tensor) -> None:
    raise NSAError(
        "nsa::gated_attention has no gradient: a graph that was captured for inference is being trained. Capture "
        "it with gradients enabled and inputs or parameters that require them."
    )


def _refuse_second_derivative(_ctx: Any, *_: Tensor) -> None:
    raise SecondDerivativeError(
        "Native Sparse Attention has first derivatives only; compute the gradient without create_graph=True."
    )


# A second import of this file, under another name or after a reload, finds the operators in place.
if not hasattr(torch.ops.nsa, "attention"):
    LIBRARY = _register()
    register_flop_formulas()
