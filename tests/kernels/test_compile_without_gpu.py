"""Every kernel compiles for Ampere and Hopper, within the shared memory that a program may have; no GPU needed."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the GPU suite compiles and runs the kernels", allow_module_level=True)

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

T = 8192


def _compiler() -> ModuleType:
    path = Path(__file__).with_name("compile_without_gpu.py")
    spec = importlib.util.spec_from_file_location("compile_without_gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.float16), (90, torch.bfloat16)], ids=["sm_80", "sm_90"])
def test_kernels_compile(capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_compile.kernels.gpu import compressed, gated, joint, selected, selection, tiles, window

    compiler = _compiler()
    monkeypatch.setattr(tiles, "is_hopper", lambda device: capability >= 90)
    query = torch.empty(1, 8, T, 128, dtype=dtype)
    key = torch.empty(1, 2, T, 128, dtype=dtype)
    lists = torch.empty(1, 2, T, 16, dtype=torch.int32)
    compressed_key = torch.empty(1, 2, T // 16 - 1, 128, dtype=dtype)
    causal = {"is_causal": True, "scale": 0.1}
    compression = {"block_length": 32, "block_stride": 16, "num_keys": T}
    forced = {"num_initial": 1, "num_local": 2}
    nothing = (None, None, None)
    with compiler.compile_only(capability) as compiled:
        output, lse = window.window_attention(query, key, key, *nothing, **causal, window=512)
        window.window_attention_backward(output, query, key, key, *nothing, lse, lse, **causal, window=512)
        compressed_tensors = (query, compressed_key, compressed_key, *nothing)
        compressed.compressed_attention(*compressed_tensors, **causal, **compression)
        compressed.compressed_attention_backward(output, *compressed_tensors, lse, lse, **causal, **compression)
        blocks = {"selection_block": 64, **forced}
        selection.select_blocks(
            query, compressed_key, None, *nothing, None, **causal, **compression, **blocks, num_selected=16
        )
        seen, valid = torch.empty(1, T, dtype=torch.int32), torch.empty(1, T // 16 - 1, dtype=torch.bool)
        selection.select_blocks(
            query, compressed_key, lse, seen, seen, valid, valid[:, : T // 64], **causal, **compression, **blocks,
            num_selected=16,
        )  # fmt: skip
        apart = {"block_length": 4, "block_stride": 4, "num_keys": T}
        selection.select_blocks(
            query, key[:, :, : T // 4], lse, *nothing, None, **causal, **apart, **blocks, num_selected=32
        )
        joint.joint_attention(query, key, key, lists, *nothing, **causal, **blocks, window=512)
        joint.joint_attention(query[:, :, :1], key, key, lists[:, :, :1], *nothing, **causal, **blocks, window=512)
        selected.selected_attention_backward(query, query, key, key, lists, *nothing, lse, lse, **causal, **blocks)
        both = (query, key, key, lists, key, key, *nothing)
        gated.gated_attention(*both, output, output[..., :3], **causal, **blocks, window=512)
    loops = {
        "flash_forward", "flash_query_gradient", "flash_key_gradient", "block_scores", "listed_gradient",
        "merge_outputs", "merge_query_gradients",
    }  # fmt: skip
    # attend_listed holds the next step's queries in registers, so its loads are ordinary ones.
    inversion = {"rank_entries", "start_tiles", "start_blocks", "order_entries", "add_shares"}
    assert {kernel.name for kernel in compiled} >= {*loops, *inversion, "attend_listed", "top_blocks"}
    # What keeps a kernel waiting for memory: Triton gives up on a loop in silence.
    assert {kernel.name for kernel in compiled if kernel.name in loops and not kernel.pipelined} == set()
    assert _over(compiled, capability, compiler) == {}
    if capability >= 90:
        ranges = [kernel for kernel in compiled if kernel.name in {"flash_forward", "flash_query_gradient"}]
        assert all(kernel.warpgroup_mma for kernel in ranges)
        # Products that ptxas serialises wait for each other.
        assert not any(kernel.is_serialized() for kernel in ranges)


@pytest.mark.parametrize(("size", "value_size"), [(64, 64), (192, 128), (256, 256)])
def test_other_head_sizes_fit_in_shared_memory(size: int, value_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_compile.kernels.gpu import compressed, selected, selection, tiles, window

    compiler = _compiler()
    monkeypatch.setattr(tiles, "is_hopper", lambda device: True)
    query, key = torch.empty(1, 8, T, size).bfloat16(), torch.empty(1, 2, T, size).bfloat16()
    value = torch.empty(1, 2, T, value_size).bfloat16()
    lists = torch.empty(1, 2, T, 16, dtype=torch.int32)
    causal = {"is_causal": True, "scale": 0.1}
    branches = [
        (window, "window_attention", (query, key, value), {"window": 512}),
        (
            compressed,
            "compressed_attention",
            (query, key[:, :, :511], value[:, :, :511]),
            {"block_length": 32, "block_stride": 16, "num_keys": T},
        ),
        (
            selected,
            "selected_attention",
            (query, key, value, lists),
            {"selection_block": 64, "num_initial": 1, "num_local": 2},
        ),
    ]
    with compiler.compile_only(90) as compiled:
        for module, name, tensors, attributes in branches:
            arguments = (*tensors, None, None, None)
            output, lse = getattr(module, name)(*arguments, **causal, **attributes)
            getattr(module, f"{name}_backward")(output, *arguments, lse, lse, **causal, **attributes)
        choice = {**branches[1][3], **branches[2][3], "num_selected": 16}
        selection.select_blocks(query, key[:, :, :511], lse, None, None, None, None, **causal, **choice)
    used = {kernel.name for kernel in compiled}
    assert used >= {"flash_key_gradient", "attend_listed", "listed_gradient", "block_scores"}
    assert _over(compiled, 90, compiler) == {}


@pytest.mark.parametrize(("size", "value_size"), [(128, 128), (64, 64), (64, 128), (128, 64)])
def test_hopper_kernels_overlap_their_products_and_do_not_spill(size: int, value_size: int) -> None:
    from nsa_compile.kernels.gpu import launch
    from nsa_compile.kernels.gpu.hopper import launch as hopper

    compiler = _compiler()
    query, key = torch.empty(1, 8, 1024, size).half(), torch.empty(1, 2, 255, size).half()
    value = torch.empty(1, 2, 255, value_size).half()
    causal = launch.Intervals(None, None, None, True)
    attention = (query, key, value, causal, launch.KeyGeometry(1024, 4, 4), 0.1)
    output, lse = launch.new_output(query, value), torch.empty(1, 8, 1024)
    with compiler.compile_only(90) as compiled:
        hopper.flash_forward(*attention, output, lse)
        hopper.flash_query_gradient(*attention, output, lse, lse, torch.empty_like(query))
        hopper.flash_key_gradient(*attention, output, lse, lse)
        window = (query, torch.empty(1, 2, 1024, size).half(), torch.empty(1, 2, 1024, value_size).half(), causal)
        hopper.flash_key_gradient(*window, launch.KeyGeometry(1024, window=512), 0.1, output, lse, lse)
        blocks = launch.KeyGeometry(1024, local_blocks=2, initial=64)
        hopper.gated_end(*window[:3], blocks, 512, 0.1, output, lse, output, torch.empty(1, 8, 1024, 3))
    names = ["hopper_forward", "hopper_query_gradient", "hopper_key_gradient"]
    assert [kernel.name for kernel in compiled] == [*names, "hopper_key_gradient", "hopper_gated_end"]
    assert _over(compiled, 90, compiler) == {}
    assert all(kernel.warpgroup_mma and kernel.bulk_copies for kernel in compiled)
    assert not any(kernel.is_serialized() for kernel in compiled)
    assert not any(kernel.spills() for kernel in (*compiled[:3], compiled[-1]))


@pytest.mark.parametrize(("size", "programs"), [(64, 3), (128, 2)])
@pytest.mark.parametrize(("heads", "dtype"), [(4, torch.bfloat16), (6, torch.float16)])
def test_gradients_through_lists_overlap_their_products_several_programs_a_multiprocessor(
    heads: int, dtype: torch.dtype, size: int, programs: int
) -> None:
    from nsa_compile.kernels.gpu.hopper import launch as hopper

    compiler = _compiler()
    rows = torch.empty(1, 1024, heads, size, dtype=dtype).transpose(1, 2)
    keys = torch.empty(1, 1024, 2, size, dtype=dtype).transpose(1, 2)
    numbers, sums = torch.empty(1, 2, 1024, dtype=torch.int32), torch.empty(1, 1, 2, 1024, size)
    lists = {"SUB": 1, "SLOTS": 13, "PAIRS_FIRST": True, "IS_FIRST": True}
    entries = (numbers, numbers[0], numbers[0])
    arguments = (rows, keys, keys, entries, rows, sums[0, 0], sums[0, 0], rows, sums, sums)
    with compiler.compile_only(90) as compiled:
        hopper.listed_gradient((32,), *arguments, (16, 64, 128), (0, 1024), 0.125, lists)
    (kernel,) = compiled
    assert kernel.warpgroup_mma
    assert kernel.pipelined
    assert not kernel.is_serialized()
    # A multiprocessor has 1 KB more than one program may have, of which the system takes as much for each.
    assert programs * (kernel.shared + 1024) <= compiler.SHARED_MEMORY_LIMIT[90] + 1024


def test_hopper_kernels_serve_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_compile.kernels.gpu.hopper import launch as hopper
    from nsa_compile.kernels.gpu.launch import Intervals, KeyGeometry

    T = hopper.FEWEST_QUERIES
    plain, compressed, window = Intervals(None, None, None, True), KeyGeometry(T, 4, 4), KeyGeometry(T, window=512)
    whole = torch.empty(1, 2, T, 128).bfloat16()
    rows = torch.zeros(1, T, dtype=torch.int32)

    def stages(
        tensor: torch.Tensor, intervals: Intervals = plain, geometry: KeyGeometry = compressed, scale: float = 0.1
    ) -> int:
        names = ("forward", "query_gradient", "key_gradient")
        return sum(hopper.handles(name, tensor, tensor, tensor, intervals, geometry, scale) for name in names)

    assert stages(whole) == 0
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    assert stages(whole) == 3
    assert stages(whole, geometry=window) == 1
    assert stages(whole, plain._replace(is_causal=False), window) == 0
    assert stages(whole, geometry=KeyGeometry(T, local_blocks=2, initial=64)) == 0
    assert stages(whole.float()) == stages(whole[..., :96]) == stages(whole[:, :, 1:]) == stages(whole, scale=-0.1) == 0
    assert stages(whole, plain._replace(first=rows, last=rows)) == stages(whole, plain._replace(valid=rows > 0)) == 0


def test_the_kernel_that_ends_gated_attention_serves_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_compile.kernels.gpu.hopper import launch as hopper
    from nsa_compile.kernels.gpu.launch import Intervals, KeyGeometry

    T = hopper.FEWEST_QUERIES
    plain, blocks = Intervals(None, None, None, True), KeyGeometry(T, local_blocks=2, initial=64)
    query, key = torch.empty(1, 4, T, 128).bfloat16(), torch.empty(1, 2, T, 128).bfloat16()
    rows = torch.zeros(1, T, dtype=torch.int32)

    def serves(
        queries: torch.Tensor = query,
        keys: torch.Tensor = key,
        intervals: Intervals = plain,
        geometry: KeyGeometry = blocks,
        window: int = 128,
        scale: float = 0.1,
    ) -> bool:
        return hopper.handles_gated_end(queries, keys, keys, intervals, geometry, window, scale)

    assert not serves()
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    assert serves()
    assert serves(geometry=KeyGeometry(T, local_blocks=1))
    # The window ends within the local blocks; there are none; blocks are no tiles.
    assert not serves(window=127)
    assert not serves(geometry=KeyGeometry(T))
    assert not serves(geometry=KeyGeometry(T, empty=True))
    assert not serves(geometry=KeyGeometry(T, local_blocks=2, selection_block=32))
    # One head for each KV head, or three; other heads, dtypes, keys and visibility.
    assert not serves(query[:, :2])
    assert not serves(torch.empty(1, 6, T, 128).bfloat16())
    assert not serves(query[..., :96], key[..., :96])
    assert not serves(query.float(), key.float())
    assert not serves(query[:, :, 1:], key[:, :, 1:])
    assert not serves(keys=torch.empty(1, 2, T + 1, 128).bfloat16())
    assert not serves(scale=0.0)
    assert not serves(intervals=plain._replace(first=rows, last=rows))
    assert not serves(intervals=plain._replace(valid=rows > 0))


def test_the_kernel_for_gradients_through_lists_serves_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_compile.kernels.gpu.hopper import launch as hopper

    T = hopper.FEWEST_QUERIES
    rows = torch.empty(1, 4, T, 64).bfloat16()
    keys = rows[:, :2]

    def serves(
        query: torch.Tensor = rows,
        key: torch.Tensor = keys,
        value: torch.Tensor = keys,
        grad: torch.Tensor = rows,
        partial: torch.Tensor = rows,
        block_size: int = 64,
        *,
        is_masked: bool = False,
        scale: float = 0.1,
    ) -> bool:
        return hopper.handles_lists(query, key, value, grad, partial, block_size, is_masked, scale)

    assert not serves()
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    assert serves()
    # Parts of blocks, other blocks, heads, dtypes and scales, and few queries.
    assert not serves(is_masked=True)
    assert not serves(block_size=32)
    assert serves(*(torch.empty(1, 2, T, 128).bfloat16(),) * 4)
    assert not serves(*(torch.empty(1, 2, T, 256).bfloat16(),) * 4)
    assert not serves(value=torch.empty(1, 2, T, 128).bfloat16())
    assert not serves(*(each.float() for each in (rows, keys, keys, rows)))
    assert not serves(scale=0.0)
    assert not serves(rows[:, :, 1:], grad=rows[:, :, 1:])
    assert not serves(torch.empty(1, 130, T, 64, device="meta").bfloat16(), rows[:, :1], rows[:, :1])
    # Rows that no copy of 16 bytes takes; more numbers than 32 bits count.
    assert not serves(grad=torch.empty(1, 4, T, 65).bfloat16()[..., 1:])
    assert not serves(partial=torch.empty(1 << 31, device="meta"))
    assert not serves(
        grad=torch.empty(1, device="meta").expand(1, 4, T, 64).as_strided((1, 4, T, 64), (0, 1 << 30, 64, 1))
    )


def test_an_unknown_gluon_leaves_attention_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_compile.kernels.gpu import launch, ranges

    name = "nsa_compile.kernels.gpu.hopper"
    monkeypatch.setitem(sys.modules, f"{name}.launch", None)
    if name in sys.modules:
        monkeypatch.delattr(sys.modules[name], "launch", raising=False)
    find = ranges.hopper.__wrapped__
    assert find("cpu") is None
    with pytest.warns(UserWarning, match="Gluon is unknown"):
        assert find("cuda") is None
    monkeypatch.setattr(ranges, "hopper", lambda _: None)
    rows = torch.empty(1, 2, 5000, 64)
    attention = (rows, rows, rows, launch.Intervals(None, None, None, True), launch.KeyGeometry(5000), 0.1)
    assert ranges._kernels("forward", *attention) is launch


def _over(compiled: list, capability: int, compiler: ModuleType) -> dict[str, int]:
    """Kernels that need more shared memory than a program may have."""
    limit = compiler.SHARED_MEMORY_LIMIT[capability]
    return {kernel.name: kernel.shared for kernel in compiled if kernel.shared > limit}
