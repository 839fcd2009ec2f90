"""A Triton template whose fused readers are computed once a row where they depend on the row alone.

Inductor numbers the elements of a template's output tile in one flat index, and reads every fused tensor for every
element.  A gate is one number for a row of D_v elements: read and put through a sigmoid D_v times, it cost twice
what the attention to the window itself takes (kernels/gpu/NOTES.md).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

# What the template's source defines beside the tile's indices: the flat index of each row, [BLOCK_M, 1], and whether
# it is inside.  A row has DV elements, and the tile DV columns or more.
ROW, ROW_STORED, COLUMNS = "row", "row_stored", "DV"
_ROW_SHAPE = ("BLOCK_M", "1")


@functools.cache
def rowwise_template_class() -> type[Any]:
    """Returns a subclass of Inductor's `TritonTemplate`; its source must define `ROW` and `ROW_STORED`.

    Raises:
        ImportError: this torch has no such template.
        AttributeError: or its kernels are written in another way.
    """
    import sympy
    from torch._inductor.codegen.simd import IterationRangesEntry
    from torch._inductor.select_algorithm import TritonTemplate, TritonTemplateKernel
    from torch._inductor.virtualized import V

    inherited_entry = TritonTemplateKernel.codegen_iteration_ranges_entry
    inherited_indexing = TritonTemplateKernel.indexing
    row = sympy.Symbol(ROW, integer=True, nonnegative=True)

    class RowwiseKernel(TritonTemplateKernel):
        """Code of one kernel, what is fused into it included."""

        def codegen_iteration_ranges_entry(self, entry: Any) -> None:
            """Writes the line that computes a part of the flat index, from the row where that suffices."""
            if self._is_of_rows(entry):
                # The flat index is row · DV + column; divided by a multiple of DV, the column falls away.
                by_row = entry.expr.subs({entry.root.symbol(): row * self.meta[COLUMNS]})
                self.body.writeline(f"{entry.name} = {self.kexpr(self.rename_indexing(by_row))}")
            else:
                inherited_entry(self, entry)

        def indexing(self, index: Any, **options: Any) -> Any:
            """Works an index into a tensor out: as a column of rows, where that suffices."""
            with self._on_rows() if self._reads_rows(index) else contextlib.nullcontext():
                return inherited_indexing(self, index, **options)

        def _is_of_rows(self, entry: Any) -> bool:
            columns = self.meta.get(COLUMNS)
            return (
                isinstance(entry, IterationRangesEntry)
                and columns is not None
                and columns > 1  # else the flat index itself is one of rows, and the tile is padded
                and bool(V.graph.sizevars.statically_known_multiple_of(entry.divisor, columns))
            )

        def _reads_rows(self, index: Any) -> bool:
            if self.template_mask is None:
                return False
            # By name: the tile's indices are called in an index what the source calls them.
            named = {entry.name: entry for entry in self.range_tree_nodes.values()}
            entries = [named[symbol.name] for symbol in index.free_symbols if symbol.name in named]
            return bool(entries) and all(map(self._is_of_rows, entries))

        @contextlib.contextmanager
        def _on_rows(self) -> Iterator[None]:
            kernel: Any = self  # torch declares narrower types than it uses
            kept = kernel.template_mask, kernel.template_out_shape
            kernel.template_mask, kernel.template_out_shape = ROW_STORED, _ROW_SHAPE
            try:
                yield
            finally:
                kernel.template_mask, kernel.template_out_shape = kept

    class RowwiseTemplate(TritonTemplate):
        """A template of such kernels."""

        kernel_type = RowwiseKernel

    return RowwiseTemplate
