"""Lets Inductor generate the last kernel of the window branch and of joint attention, fused with what follows it.

The operators stay what they are; only in code that Inductor generates for a GPU do they become a kernel from a template
(kernels/gpu/templates.py).  Where a template does not apply, Inductor calls the operator as it is.  What gradients need
of the outputs becomes a sum that Inductor fuses with the gates' gradients, which read the same tensors.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch

from nsa_compile import compat

_MAX_HEAD_SIZE = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def register_templates() -> bool:
    """Registers the lowerings, once in a process; returns whether there are any, which takes a GPU and Triton."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    return _register()


@functools.cache
def _register() -> bool:
    from nsa_compile.kernels.operators import BRANCH_OPERATORS

    tools = compat.template_tools()
    if tools is None:
        return False
    forward = ("select_blocks", "joint_listed", "gated_attention", *BRANCH_OPERATORS)
    names = [*forward, *(f"{name}_backward" for name in BRANCH_OPERATORS)]
    tools.reads_memory([getattr(torch.ops.nsa, name).default for name in names])
    for name, lower in {"window_attention": _window_attention, "joint_attention": _joint_attention}.items():
        operator = getattr(torch.ops.nsa, name).default
        tools.register(operator, _or_opaque(tools, operator, lower))
    tools.register(torch.ops.nsa.output_dot_gradient.default, functools.partial(_output_dot_gradient, tools))
    return True


def _output_dot_gradient(tools: compat.TemplateTools, output: Any, grad_output: Any) -> Any:
    dtype = torch.float64 if output.get_dtype() == torch.float64 else torch.float32
    return tools.sum_of_products(output, grad_output, dtype)


def _or_opaque(tools: compat.TemplateTools, operator: Any, lower: Callable[..., Any]) -> Callable[..., Any]:
    def lower_or_call(query: Any, key: Any, value: Any, *rest: Any, **attributes: Any) -> Any:
        result = None
        if _is_supported(tools, query, key, value, attributes["scale"]):
            result = lower(tools, (query, key, value), *rest, **attributes)
        return tools.opaque(operator, query, key, value, *rest, **attributes) if result is None else result

    return lower_or_call


def _is_supported(tools: compat.TemplateTools, query: Any, key: Any, value: Any, scale: Any) -> bool:
    if query.get_device().type != "cuda" or query.get_dtype() not in _DTYPES:
        return False
    # A scale that is no number is one that dynamic shapes made symbolic.
    if not isinstance(scale, int | float):
        return False
    if any(size == 0 for tensor in (query, key, value) for size in tensor.get_size()):
        return False
    if max(tools.fixed_size(tensor.get_size()[3]) for tensor in (query, value)) > _MAX_HEAD_SIZE:
        return False
    return tools.can_index((query, key, value), _output_layout(tools, query, value))


def _output_layout(tools: compat.TemplateTools, query: Any, value: Any) -> Any:
    """Memory of the template's output: `[B, T, H, D_v]`."""
    batch, num_heads, num_queries, _ = query.get_size()
    size = (batch, num_queries, num_heads, value.get_size()[3])
    return tools.contiguous_layout(size, query.get_dtype(), query.get_device())


def _window_attention(
    tools: compat.TemplateTools,
    heads: tuple[Any, Any, Any],
    first_key: Any,
    last_key: Any,
    key_valid: Any,
    *,
    is_causal: bool,
    scale: float,
    window: int,
) -> tuple[Any, Any] | None:
    sight = {"FIRST": first_key, "LAST": last_key, "VALID": key_valid}
    return _attend_range(tools, heads, sight, {"WINDOW": window, "IS_CAUSAL": is_causal}, scale)


def _joint_attention(
    tools: compat.TemplateTools,
    heads: tuple[Any, Any, Any],
    block_indices: Any,
    first_key: Any,
    last_key: Any,
    key_valid: Any,
    *,
    is_causal: bool,
    scale: float,
    selection_block: int,
    window: int,
    num_initial: int = 0,
    num_local: int = 0,
) -> tuple[Any, Any] | None:
    """The listed blocks by an operator, then the densely read keys by a template that starts from its output."""
    sight = (first_key, last_key, key_valid)
    base, base_lse = tools.opaque(
        torch.ops.nsa.joint_listed.default,
        *heads,
        block_indices,
        *sight,
        is_causal=is_causal,
        scale=scale,
        selection_block=selection_block,
        window=window,
        num_initial=num_initial,
        num_local=num_local,
    )
    # As kernels/gpu/joint.py divides the work.
    is_plain = first_key is None and key_valid is None and is_causal
    constants = {
        "WINDOW": window,
        "IS_CAUSAL": is_causal,
        "SELECTION_BLOCK": selection_block,
        "LOCAL_BLOCKS": num_local if is_plain else 0,
        "INITIAL": num_initial * selection_block if is_plain else 0,
    }
    optional = {"FIRST": first_key, "LAST": last_key, "VALID": key_valid, "BASE": base, "BASE_LSE": base_lse}
    return _attend_range(tools, heads, optional, constants, scale)


def _attend_range(
    tools: compat.TemplateTools,
    heads: tuple[Any, Any, Any],
    optional: dict[str, Any],
    constants: dict[str, Any],
    scale: float,
) -> tuple[Any, Any] | None:
    """Attention to a range of keys, from a template.

    Args:
        tools: of Inductor.
        heads: query `[B, H, T, D]`, key `[B, H_kv, S, D]`, value `[B, H_kv, S, D_v]`.
        optional: the template's further tensors, by name; None for those that are not there.
        constants: its compile-time constants that say which keys a query sees.
        scale: factor of the logits.

    Returns:
        output `[B, H, T, D_v]` and lse `[B, H, T]`; None if no kernel can be generated.
    """
    from nsa_compile.kernels.gpu import tiles
    from nsa_compile.kernels.gpu.templates import RangeTemplate

    query, key, value = heads
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    variant = RangeTemplate(has_interval="FIRST" in given, has_valid="VALID" in given, has_base="BASE" in given)
    template = tools.template(variant.name, _grid, variant.source)
    batch, num_heads, num_queries, _ = query.get_size()
    num_heads, num_kv_heads, size, value_size = map(
        tools.fixed_size, (num_heads, key.get_size()[1], query.get_size()[3], value.get_size()[3])
    )
    dtype, device = query.get_dtype(), query.get_device()
    lse = tools.empty((batch, num_heads, num_queries), torch.float32, device)
    inputs = [*map(tools.realized, (*heads, *given.values())), lse]
    layout = _output_layout(tools, query, value)
    constants = variant.constants(
        H=num_heads,
        SCALE_LOG2=scale * math.log2(math.e),
        **tiles.head_sizes(num_heads // num_kv_heads, size, value_size, dtype),
        **constants,
    )
    candidates = tiles.forward_candidates(tiles.width(size, value_size), dtype.itemsize, device)
    choices: list[Any] = []
    for candidate in candidates if tools.autotunes else candidates[:1]:
        template.maybe_append_choice(
            choices,
            input_nodes=inputs,
            layout=layout,
            call_sizes=[batch, num_heads, num_queries],
            mutated_inputs=[lse],
            **constants,
            **candidate,
        )
    if not choices:
        return None
    fills = {variant.arguments.index(name): fill for name, fill in _FILLS.items() if name in given}
    output = tools.chosen(variant.name, choices, inputs, layout, fills)
    return tools.permuted(output, (0, 2, 1, 3)), lse


def _grid(
    batch: Any, num_heads: Any, num_queries: Any, meta: dict[str, Any], *, cdiv: Callable[[Any, int], Any]
) -> tuple[Any, Any, Any]:
    return cdiv(num_queries, meta["BLOCK_M"]), batch * num_heads, 1


def _fill_last(tensor: torch.Tensor) -> None:
    tensor.copy_(torch.arange(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device).expand_as(tensor))


# For timing: a plain causal mask.  With random intervals most queries would see nothing, whatever the tiles.
_FILLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "FIRST": torch.Tensor.zero_,
    "LAST": _fill_last,
    "VALID": lambda tensor: tensor.fill_(True),
}
