"""Which blocks a `BlockMask` of flex_attention lets its kernels visit: all, those of its mask_mod, or others.

torch's eager flex_attention reads the mask_mod alone; the lists of blocks say what a kernel may skip.  Lists from
outside the graph are taken to be those of the mask_mod.  Lists made in the graph must be made as `create_block_mask`
makes them, of a mask that the prover compares with the mask_mod: others may be a selection of keys.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from nsa_compile.passes.calls import operation
from nsa_compile.passes.constants import constant_of
from nsa_compile.passes.metadata import dtype_of, number_of, recorded_shape, same_shape, shape_of
from nsa_compile.passes.parts import Problem
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.sites import Reason, Scope

_CASTS = ("to", "contiguous", "clone")
_WIDE = (torch.int32, torch.int64)


@dataclasses.dataclass(frozen=True)
class BlockLists:
    """The parts of a block mask that decide which keys a query meets.

    Attributes:
        partial: how many blocks each row of blocks visits under the mask_mod, and which.
        full: likewise without the mask_mod; None where there are none.
        sizes: of a block, in queries and keys.
        predicate: the mask_mod.
    """

    partial: tuple[fx.Node, fx.Node]
    full: tuple[fx.Node, fx.Node] | None
    sizes: tuple[Any, Any]
    predicate: Any

    @classmethod
    def of(cls, arguments: Any) -> "BlockLists | None":
        """Reads `BlockMask.as_tuple()`, as the operator takes it; None where it is not that."""
        if not isinstance(arguments, Sequence) or len(arguments) < 13:
            return None
        _, _, *lists, queries, keys, predicate = arguments
        partial, full = lists[:2], lists[2:4]
        if not all(isinstance(each, fx.Node) for each in partial):
            return None
        has_full = all(isinstance(each, fx.Node) for each in full)
        if not has_full and any(each is not None for each in full):
            return None
        return cls((partial[0], partial[1]), (full[0], full[1]) if has_full else None, (queries, keys), predicate)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What block lists leave to be visited: the blocks of `mask`, or all that the mask_mod allows where it is None."""

    mask: fx.Node | None = None


def read_block_lists(lists: BlockLists, call: fx.Node, scope: Scope, writes: Writes) -> Coverage | Problem:
    """Tells which blocks are visited.

    Args:
        lists: the lists.
        call: the call of flex_attention that reads them.
        scope: the graph that holds it.
        writes: the in-place writes of that graph.
    """
    nodes = (*lists.partial, *(lists.full or ()))
    if all(_is_outside(node, scope, writes) for node in nodes) or _is_everything(lists, call, writes):
        return Coverage()
    mask = _covered_mask(lists)
    if mask is not None and not _is_written(nodes, mask, writes):
        return Coverage(mask)
    sentence = "The lists of blocks are made in the graph, and not as create_block_mask makes them."
    return Problem(Reason.ALREADY_SPARSE, sentence, nodes)


def _is_written(nodes: Sequence[fx.Node], mask: fx.Node, writes: Writes) -> bool:
    """Whether anything on the way from a mask to its lists is written in place."""
    pending, seen = list(nodes), {mask}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    return any(True for node in seen for _ in writes.after(node, writes.position(mask)))


def _is_outside(node: fx.Node, scope: Scope, writes: Writes) -> bool:
    if any(True for _ in writes.after(node, writes.position(node))):
        return False
    made, _ = scope.resolve(node)
    return isinstance(made, fx.Node) and made.op in ("placeholder", "get_attr")


def _is_everything(lists: BlockLists, call: fx.Node, writes: Writes) -> bool:
    """Whether there is one block, which holds everything, as where no block mask is given."""
    numbers = [number_of(size) for size in lists.sizes]
    if lists.full is not None or any(number is None or number < 2**30 for number in numbers):
        return False
    count, index = (constant_of(node, call, writes) for node in lists.partial)
    return count == 1 and index == 0


def _covered_mask(lists: BlockLists) -> fx.Node | None:
    """The mask whose blocks the lists are; None where they are made otherwise.

    With s the number of visible pairs in each block of n, partial blocks have 0 < s < n, or s > 0 where full ones,
    s = n, are not told apart.
    """
    partial = _listed(lists.partial)
    full = None if lists.full is None else _listed(lists.full)
    if partial is None or (lists.full is not None and full is None):
        return None
    compared = _comparisons(partial)
    pairs = _product(*lists.sizes)
    wanted = {("gt", 0)} if full is None else {("gt", 0), ("lt", pairs)}
    if pairs is None or {(name, number) for name, _, number in compared} != wanted:
        return None
    if full is not None:
        compared += _comparisons(full)
        if compared[-1][0] != "eq" or compared[-1][2] != pairs or len(compared) != 3:
            return None
    sums = {made for _, made, _ in compared}
    return _summed(sums.pop(), lists.sizes) if len(sums) == 1 else None


def _product(queries: Any, keys: Any) -> "int | None":
    return queries * keys if isinstance(queries, int) and isinstance(keys, int) else None


def _listed(pair: tuple[fx.Node, fx.Node]) -> fx.Node | None:
    """The truths `[B, H, rows, columns]` whose count and places in each row a pair of lists is."""
    count, index = (_uncast(node) for node in pair)
    if operation(count) != "sum" or operation(index) != "argsort" or _option(count, 1, "dim") not in (-1, [-1]):
        return None
    is_stable = index.kwargs.get("stable") is True and index.kwargs.get("descending") is True
    if not is_stable or _option(index, None, "dim") not in (None, -1) or count.args[0] is not index.args[0]:
        return None
    return _uncast(count.args[0])


def _comparisons(truths: fx.Node) -> list[tuple[str, Any, Any]]:
    """What is compared with what, in a conjunction."""
    if operation(truths).strip("_") == "and":
        return [each for operand in truths.args for each in _comparisons(_uncast(operand))]
    left, right = (*truths.args, None, None)[:2]
    return [(operation(truths), left, right)]


def _summed(total: Any, sizes: tuple[Any, Any]) -> fx.Node | None:
    """The mask of which each block's truths were added up."""
    if not isinstance(total, fx.Node) or operation(total) != "sum" or list(_option(total, 1, "dim") or ()) != [-2, -1]:
        return None
    blocks = _input(total, "permute")
    rows = None if blocks is None else _input(blocks, "view")
    if blocks is None or rows is None:
        return None
    order: tuple[Any, ...] = blocks.args[1:]
    whole = _input(rows)
    if [*(order[0] if len(order) == 1 else order)] != [0, 1, 2, 4, 3, 5] or whole is None:
        return None
    *lead, queries, query_size, keys, key_size = recorded_shape(rows)
    joined = (*lead, queries * query_size, keys * key_size)
    if (query_size, key_size) != sizes or not same_shape(shape_of(whole) or (), joined):
        return None
    return _padded(whole) if operation(whole) == "pad" else whole


def _padded(padded: fx.Node) -> fx.Node | None:
    """The mask that is filled up with false at its ends."""
    options: tuple[Any, ...] = (*padded.args[1:], "constant", None)[: max(3, len(padded.args) - 1)]
    padding, mode, value = options
    return _input(padded) if not padded.kwargs and mode == "constant" and not value and not any(padding[::2]) else None


def _input(node: fx.Node, name: str = "") -> fx.Node | None:
    """A node's first input, if it is computed by the operation of this name."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) and name in ("", operation(first)) else None


def _option(node: fx.Node, place: "int | None", name: str) -> Any:
    return node.args[place] if place is not None and len(node.args) > place else node.kwargs.get(name)


def _uncast(node: Any) -> Any:
    """What a node is a copy of, as far as no number is cut off: a truth in any dtype, a count in a wide one."""
    while isinstance(node, fx.Node) and operation(node) in _CASTS and node.args:
        if dtype_of(node) not in _WIDE and dtype_of(node.args[0]) is not torch.bool:
            break
        node = node.args[0]
    return node
