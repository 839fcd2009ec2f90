"""The learned parts as operators: gates from hidden states, and learned compression of blocks.

Composites of plain aten: one node in a graph, below it what Inductor fuses and autograd differentiates.

Letters: B batch, H query heads, H_kv KV heads, T queries, S keys, C channels of the hidden states, D head size, l
`block_length`, d `block_stride`, N_cmp compressed tokens.

Reference: arXiv 2502.11089, eqs 5 and 7.
"""

import torch
from torch import Tensor
from torch.fx.node import has_side_effect
from torch.nn import functional

from nsa_compile.errors import NotRewrittenError, ShapeError
from nsa_compile.kernels.compression import count_compressed, iterate_neighbours, mean_compress


def gates(
    hidden_states: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, output_weight: Tensor, output_bias: Tensor
) -> Tensor:
    """Computes how much each branch counts, per token and head, by an MLP and a sigmoid.

    Args:
        hidden_states: `[B, T, C]`, the attention layer's input.
        hidden_weight: `[R, C]`, R hidden units.
        hidden_bias: `[R]`.
        output_weight: `[H·3, R]`; the three branches of a head stand together.
        output_bias: `[H·3]`.

    Returns:
        `[B, H, T, 3]` in [0, 1], order compressed, selected, window.

    Reference: arXiv 2502.11089, eq 5.
    """
    hidden_states = _for_weight(hidden_states, hidden_weight)
    units = functional.silu(functional.linear(hidden_states, hidden_weight, hidden_bias))
    logits = functional.linear(units, output_weight, output_bias)
    # Half precision has no numbers between 0.998 and 1, where gates of a dense start are.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.sigmoid().unflatten(-1, (-1, 3)).transpose(1, 2)


def compress_linear(tokens: Tensor, weight: Tensor, *, block_length: int, block_stride: int) -> Tensor:
    """Compresses each l tokens, d apart, to one, by one matrix.

    Args:
        tokens: `[B, H_kv, S, D]`.
        weight: `[D, l·D]`.
        block_length: l.
        block_stride: d; divides l.

    Returns:
        `[B, H_kv, N_cmp, D]`, dtype of `tokens`.

    Reference: arXiv 2502.11089, eq 7.
    """
    return _project_blocks(tokens, weight, block_length, block_stride).to(tokens.dtype)


def compress_mlp(
    tokens: Tensor,
    position: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    *,
    block_length: int,
    block_stride: int,
) -> Tensor:
    """Compresses each l tokens, d apart, to one, by an MLP over the block with positions added.

    Args:
        tokens: `[B, H_kv, S, D]`.
        position: `[l, D]`, added to the tokens of every block.
        hidden_weight: `[R, l·D]`, R hidden units.
        hidden_bias: `[R]`.
        output_weight: `[D, R]`.
        output_bias: `[D]`.
        block_length: l.
        block_stride: d; divides l.

    Returns:
        `[B, H_kv, N_cmp, D]`, dtype of `tokens`.

    Reference: arXiv 2502.11089, eq 7.
    """
    # A position adds the same to every block, so it is projected once.
    offset = functional.linear(position.flatten(), hidden_weight, hidden_bias)
    units = functional.silu(_project_blocks(tokens, hidden_weight, block_length, block_stride) + offset)
    return functional.linear(units, output_weight, output_bias).to(tokens.dtype)


def _project_blocks(tokens: Tensor, weight: Tensor, block_length: int, block_stride: int) -> Tensor:
    """Multiplies every block, flattened to l·D numbers, with `weight`: `[R, l·D]` to `[B, H_kv, N_cmp, R]`.

    Blocks overlap.  Chunks of d tokens do not: each is read once, by one matrix product with the l/d pieces of the
    weight that may meet it, and a block is the sum over its chunks.  Neither the copy of an unfolded tensor is made,
    nor its scattered gradient.
    """
    tokens = _for_weight(tokens, weight)
    batch, heads, num_keys, size = tokens.shape
    if weight.shape[1] != block_length * size:
        raise ShapeError(
            f"the compression's weight has {weight.shape[1]} columns; blocks of {block_length} tokens with head size "
            f"{size} need {block_length * size}: attach to the model again."
        )
    if count_compressed(num_keys, block_length, block_stride) == 0:
        return functional.linear(tokens.new_empty(batch, heads, 0, block_length * size), weight)
    neighbours = block_length // block_stride
    num_chunks = num_keys // block_stride
    chunks = tokens[:, :, : num_chunks * block_stride].reshape(batch, heads, num_chunks, block_stride * size)
    pieces = weight.unflatten(1, (neighbours, block_stride * size)).transpose(0, 1)
    products = functional.linear(chunks, pieces.reshape(-1, block_stride * size))
    shifted = iterate_neighbours(products.unflatten(-1, (neighbours, -1)), 2, neighbours)
    first, *rest = (each.select(3, number) for number, each in enumerate(shifted))
    for each in rest:
        first = first + each
    return first


def _for_weight(tensor: Tensor, weight: Tensor) -> Tensor:
    """Casts an input to its weight's dtype, as `linear` wants it; autocast casts both itself."""
    return tensor if torch.is_autocast_enabled(tensor.device.type) else tensor.to(weight.dtype)


def _refuse_to_run(parts: list[Tensor], originals: list[Tensor], description: str) -> Tensor:  # noqa: ARG001
    raise NotRewrittenError(
        "this graph holds an attention with learned parts, and was not rewritten: compile the model with "
        "backend='nsa', or give an exported program to nsa_compile.rewrite; nsa_compile.detach(model) makes the model "
        "dense again."
    )


def _fake_bind(parts: list[Tensor], originals: list[Tensor], description: str) -> Tensor:  # noqa: ARG001
    return parts[0].new_empty(0)


_SCHEMAS = {
    "compress_mean": "(Tensor tokens, *, int block_length, int block_stride) -> Tensor",
    "gates": "(Tensor hidden_states, Tensor hidden_weight, Tensor hidden_bias, Tensor output_weight, "
    "Tensor output_bias) -> Tensor",
    "compress_linear": "(Tensor tokens, Tensor weight, *, int block_length, int block_stride) -> Tensor",
    "compress_mlp": "(Tensor tokens, Tensor position, Tensor hidden_weight, Tensor hidden_bias, Tensor output_weight, "
    "Tensor output_bias, *, int block_length, int block_stride) -> Tensor",
}


_IMPLEMENTATIONS = {
    "gates": gates,
    "compress_mean": mean_compress,
    "compress_linear": compress_linear,
    "compress_mlp": compress_mlp,
}


def _register() -> torch.library.Library:
    library = torch.library.Library("nsa", "FRAGMENT")
    for name, implementation in _IMPLEMENTATIONS.items():
        library.define(name + _SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
        library.impl(name, implementation, "CompositeImplicitAutograd")
    # The marker: hands a module's learned parts to the pass that rewrites the module's attention, and is erased.
    library.define(
        "bind(Tensor[] parts, Tensor[] originals, str description) -> Tensor", tags=torch.Tag.pt2_compliant_tag
    )
    library.impl("bind", _refuse_to_run, "CompositeExplicitAutograd")
    torch.library.register_fake("nsa::bind", _fake_bind, lib=library)
    # Nothing reads what it gives; tracers and compilers must not drop it.
    has_side_effect(torch.ops.nsa.bind.default)
    has_side_effect(torch.ops.nsa.bind)
    return library


# A second import of this file, under another name or after a reload, finds the operators in place.
if not hasattr(torch.ops.nsa, "bind"):
    LIBRARY = _register()
