"""Source of the templates from which Inductor generates the last kernel of a branch, and fuses what follows into it.

The text only says where things are: it calls `attend_range`, as `flash_forward` does for eager calls, and stores the
lse; `store_output` is where Inductor puts the store of the output, or whatever reads the output, computed on the tile.

`row` and `row_stored` are for what is fused and depends on the row alone; see nsa_compile/rowwise.py.

The output is laid out in memory as [B, T, H, D_v], what models want next: gates, sum, transpose and cast then run over
the same flat index as the template's store, and so fuse under symbolic sizes too.

Compile-time constants are H, WINDOW, IS_CAUSAL, SCALE_LOG2, those of `tiles.head_sizes` and of `tiles_for`; and
LOCAL_BLOCKS, INITIAL and SELECTION_BLOCK, which may be left out.
"""

import dataclasses
from typing import Any

_SOURCE = """{{{{def_kernel({arguments})}}}}
    T = tl.cast({{{{size("QUERY", 2)}}}}, tl.int32)
    S = tl.cast({{{{size("KEY", 2)}}}}, tl.int32)
    stride_qb, stride_qh, stride_qt, stride_qd = {{{{stride("QUERY")}}}}
    stride_kb, stride_kh, stride_kn, stride_kd = {{{{stride("KEY")}}}}
    stride_vb, stride_vh, stride_vn, stride_vd = {{{{stride("VALUE")}}}}
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // H
    head = tl.program_id(1) % H
    output, lse = attend_range(
        QUERY, KEY, VALUE, {first}, {last}, {valid}, {base}, {base_lse},
        stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
        batch, head, tile, H, T, S, S, WINDOW, LOCAL_BLOCKS, tl.minimum(INITIAL, S), SCALE_LOG2,
        GROUP, 1, 1, SELECTION_BLOCK, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, IS_CAUSAL,
        {has_interval}, {has_valid}, INITIAL > 0, {has_base}, False, PRECISION,
    )
    tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(LSE + tl.program_id(1).to(tl.int64) * T + tokens, lse, mask=tokens < T)
    b = batch.to(INDEX_DTYPE)
    t = tokens[:, None].to(INDEX_DTYPE)
    h = head.to(INDEX_DTYPE)
    dv = tl.arange(0, BLOCK_DV)[None, :].to(INDEX_DTYPE)
    stored = (t < T) & (dv < DV)
    row = h + H * (t + T * b)
    row_stored = t < T
    {{{{store_output(("b", "t", "h", "dv"), "output", "stored", val_shape=("BLOCK_M", "BLOCK_DV"))}}}}


from nsa_compile.kernels.gpu.forward import attend_range
"""


@dataclasses.dataclass(frozen=True)
class RangeTemplate:
    """A template of attention to one range of keys: which tensors it takes beside query, key, value and lse.

    Args:
        has_interval: `first_key` and `last_key`.
        has_valid: `key_valid`.
        has_base: an attention to other keys, and its lse, that the softmax starts from.
    """

    has_interval: bool
    has_valid: bool
    has_base: bool

    @property
    def name(self) -> str:
        """A name for each variant."""
        flags = {"interval": self.has_interval, "valid": self.has_valid, "base": self.has_base}
        return "_".join(["nsa_range", *(name for name, is_set in flags.items() if is_set)])

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the kernel's tensors, in order; LSE is written."""
        optional = {
            "FIRST": self.has_interval,
            "LAST": self.has_interval,
            "VALID": self.has_valid,
            "BASE": self.has_base,
            "BASE_LSE": self.has_base,
        }
        return ("QUERY", "KEY", "VALUE", *(name for name, is_set in optional.items() if is_set), "LSE")

    def constants(self, **given: Any) -> dict[str, Any]:
        """Returns the compile-time constants as the template takes them: numbers, and code for strings."""
        constants = {"LOCAL_BLOCKS": 0, "INITIAL": 0, "SELECTION_BLOCK": 1, **given}
        return {name: repr(value) if isinstance(value, str) else value for name, value in constants.items()}

    @property
    def source(self) -> str:
        """The text, for Inductor's `TritonTemplate`."""

        def given(name: str) -> str:
            return name if name in self.arguments else "QUERY"  # stands in, and is not read

        return _SOURCE.format(
            arguments=", ".join(f'"{name}"' for name in self.arguments),
            first=given("FIRST"),
            last=given("LAST"),
            valid=given("VALID"),
            base=given("BASE"),
            base_lse=given("BASE_LSE"),
            has_interval=self.has_interval,
            has_valid=self.has_valid,
            has_base=self.has_base,
        )
