import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

VISIBILITIES = ("causal", "all", "decode", "packed", "sliding", "scattered", "left_padding", "right_padding", "holes")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Query, key and value of one case, and what each query sees."""

    query: Tensor
    key: Tensor
    value: Tensor
    sight: dict

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def num_keys(self) -> int:
        return self.key.shape[2]


def _sight(visibility: str, batch: int, num_queries: int, num_keys: int) -> dict:
    time = torch.arange(num_queries)
    sight: dict = {"is_causal": True}
    if visibility == "all":
        sight["is_causal"] = False
    elif visibility == "decode":  # queries at the end of the keys, as in a cache
        sight["last_key"] = (time + num_keys - num_queries).expand(1, -1).to(torch.int64)
    elif visibility == "packed":  # three documents
        sight["first_key"] = (time // max(1, num_queries // 3) * max(1, num_queries // 3)).expand(batch, -1)
    elif visibility == "sliding":
        sight["first_key"] = (time - num_keys // 3).unsqueeze(0).to(torch.int32)
    elif visibility == "scattered":  # any bounds, outside the keys and empty ones too
        sight["first_key"] = torch.randint(-5, num_keys + 5, (batch, num_queries))
        sight["last_key"] = sight["first_key"] + torch.randint(-3, num_keys + 9, (batch, num_queries))
    elif visibility == "left_padding":
        length = torch.randint(0, num_keys + 1, (batch, 1))
        sight["key_valid"] = torch.arange(num_keys) >= length
    elif visibility == "right_padding":
        length = torch.randint(0, num_keys + 1, (batch, 1))
        sight["key_valid"] = torch.arange(num_keys) < length
    elif visibility == "holes":
        # Long holes and single ones: whole blocks without a valid key must occur.
        sight["key_valid"] = torch.rand(batch, num_keys) > 0.1
        sight["key_valid"] &= torch.rand(batch, num_keys // 16 + 1).gt(0.3).repeat_interleave(16, 1)[:, :num_keys]
    return sight


def _draw_inputs(
    visibility: str = "causal",
    *,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    num_queries: int = 63,
    num_keys: int | None = None,
    head_size: int = 8,
    value_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = True,
    transposed: bool = False,
    seed: int = 0,
) -> Inputs:
    torch.manual_seed(seed)
    num_keys = num_queries if num_keys is None else num_keys
    value_size = head_size if value_size is None else value_size

    def draw(heads: int, length: int, size: int) -> Tensor:
        if transposed:
            tensor = torch.randn(batch, length, heads, size, dtype=torch.float64).to(dtype).transpose(1, 2)
        else:
            tensor = torch.randn(batch, heads, length, size, dtype=torch.float64).to(dtype)
        return tensor.requires_grad_(requires_grad)

    query, key = draw(kv_heads * group, num_queries, head_size), draw(kv_heads, num_keys, head_size)
    value = draw(kv_heads, num_keys, value_size)
    return Inputs(query, key, value, _sight(visibility, batch, num_queries, num_keys))


def _relative_error(given: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest magnitude, or over 0.05 where all is smaller, as gradients that cancel are.

    Infinite if `given` holds a NaN or has another shape.
    """
    given, exact = given.detach(), exact.detach()
    if given.shape != exact.shape or bool(given.isnan().any()):
        return float("inf")
    if exact.numel() == 0:
        return 0.0
    return float((given.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(0.05))


@pytest.fixture(scope="session")
def draw_inputs() -> Callable[..., Inputs]:
    """Draws query, key, value and visible keys: `draw_inputs("packed", num_queries=63, ...)`."""
    return _draw_inputs


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    return _relative_error


@pytest.fixture(params=VISIBILITIES)
def visibility(request: pytest.FixtureRequest) -> str:
    return request.param


def _capture(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


@pytest.fixture(scope="session")
def capture() -> Callable[[Callable[[], list[Tensor]]], tuple[torch.cuda.CUDAGraph, list[Tensor]]]:
    """Captures what a function does on the GPU in a CUDA graph; returns it, and where replaying puts the results."""
    return _capture
