"""Keys and values before models repeat them for grouped queries.

Models write the repetition as `k[:, :, None].expand(...).reshape(...)`, `repeat_interleave`, `repeat`, einops, or
leave it to `enable_gqa` or broadcasting.  Followed back through its views, a repeated head axis turns out to be a
product (kv, group) of which the original holds only kv.
"""

import dataclasses
from collections.abc import Sequence

from torch import fx

from nsa_compile.passes.axes import Axis, Dimensions, leaves, resolved
from nsa_compile.passes.layout import LabelledTensor
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.views import back_through


def sources(tensor: LabelledTensor, reader: fx.Node, writes: Writes) -> list[LabelledTensor]:
    """Lists the tensor and what it is a view, a repetition or a widened copy of, nearest first.

    Only such sources are listed as hold, where `reader` runs, what they held when the view was made.
    """
    found = [tensor]
    while (step := back_through(found[-1].node, found[-1].dims)) is not None:
        node, dims = step
        if any(True for _ in writes.between(node, writes.position(found[-1].node), writes.position(reader))):
            break
        found.append(LabelledTensor(node, dims))
    return found


@dataclasses.dataclass(frozen=True)
class HeadGroups:
    """Which axes of the queries have keys of their own, and which share keys.

    Attributes:
        own: axes that queries have in common with keys and values, in the queries' order: batch and KV heads.
        shared: axes that only queries have beside their length: heads that share keys and values.
    """

    own: tuple[Axis, ...]
    shared: tuple[Axis, ...]


def head_groups(
    query: LabelledTensor, keys: Sequence[LabelledTensor], values: Sequence[LabelledTensor], length: Sequence[Axis]
) -> HeadGroups:
    """Tells batch and KV heads from the heads that share them, as far as the key's and value's sources go.

    Args:
        query: the queries, without head size among their axes' roles: axes in `length` are left out.
        keys: sources of the keys, nearest first.
        values: sources of the values.
        length: axes of the query length and the head size.
    """
    left_out = set(leaves(length))
    order = [axis for dim in resolved(query.dims) for axis in dim if axis not in left_out]
    needed = keys[-1].axes | values[-1].axes
    if not _is_grouped_in_order(query.dims, needed, left_out):
        needed = keys[0].axes | values[0].axes
    own = tuple(axis for axis in order if axis in needed)
    return HeadGroups(own, tuple(axis for axis in order if axis not in needed))


def _is_grouped_in_order(dims: Dimensions, needed: frozenset[Axis], left_out: set[Axis]) -> bool:
    """Whether, in each dimension, heads that share a key stand side by side: query head h reads key head h // G."""
    for dim in resolved(dims):
        is_own = [axis in needed for axis in dim if axis not in left_out]
        if is_own != sorted(is_own, reverse=True):
            return False
    return True
