"""Trains a model with learned parts in several processes; run by test_attach_distributed.py, a process for each rank.

Each check is a function of the rank that returns what the test compares; rank 0 writes the results to a file.
"""

import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from nsa_compile import NSABackend, NSAConfig, attach, nsa_attention, rewrite
from nsa_compile.kernels import attention

WIDTH, HEADS = 64, 4
CONFIG = NSAConfig(
    block_length=16,
    block_stride=16,
    selection_block=16,
    num_selected=3,
    window=16,
    combine="gated",
    compression="mlp",
    branch_kv="independent",
)


# A GPU for each process, where the test says so.
DEVICE = torch.device(f"cuda:{os.environ['RANK']}" if os.environ.get("ON_GPUS") else "cpu")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, states: Tensor) -> Tensor:
        heads = [p(states).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)]
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        return states + self.out(attended.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states)
        return states


def make() -> Model:
    torch.manual_seed(0)
    model = Model()
    attach(model, CONFIG, torch.randn(4, 90, WIDTH), start="scratch")
    return model.to(DEVICE)


def batch() -> Tensor:
    return torch.randn(4, 90, WIDTH, generator=torch.Generator().manual_seed(5)).to(DEVICE)


def compiled_ahead(graph_module: Any, inputs: list[Any]) -> Any:
    """The backend; on a CPU with AOTAutograd and without Inductor, which takes long there."""
    if DEVICE.type == "cuda":
        return NSABackend(CONFIG)(graph_module, inputs)
    rewrite(graph_module)
    return aot_eager(graph_module, inputs)


def train(run: Callable[[Tensor], Tensor], parameters: Any, states: Tensor) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):
        run(states).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def data_parallel(rank: int) -> dict[str, Any]:
    """Two processes with half of the batch each."""
    model = make()
    wrapped = DistributedDataParallel(model)
    train(wrapped, wrapped.parameters(), batch().chunk(2)[rank])
    return {"state": model.state_dict(), "output": model(batch()).detach()}


def data_parallel_compiled(rank: int) -> dict[str, Any]:
    """The model is compiled, then wrapped."""
    model = make()
    wrapped = DistributedDataParallel(torch.compile(model, backend=compiled_ahead))
    train(wrapped, wrapped.parameters(), batch().chunk(2)[rank])
    return {"state": model.state_dict(), "output": model(batch()).detach()}


def _sharded(rank: int, *, compiled: bool) -> dict[str, Any]:
    model = make()
    mesh = init_device_mesh(DEVICE.type, (distributed.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
        if compiled:
            layer.compile(backend=compiled_ahead)
    fully_shard(model, mesh=mesh)
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    train(model, model.parameters(), batch().chunk(2)[rank])
    output = model(batch()).detach()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"state": state, "output": output, "sharded": sharded}


def sharded(rank: int) -> dict[str, Any]:
    """`fully_shard`, not compiled."""
    return _sharded(rank, compiled=False)


def sharded_compiled(rank: int) -> dict[str, Any]:
    """`fully_shard`, each layer compiled."""
    return _sharded(rank, compiled=True)


def tensor_parallel(rank: int) -> dict[str, Any]:
    """The operator with heads, or batches, spread over the processes; outputs and gradients in every mode."""
    mesh = init_device_mesh(DEVICE.type, (distributed.get_world_size(),))
    generator = torch.Generator().manual_seed(3)
    made = {
        "query": torch.randn(2, 8, 90, 16, generator=generator),
        "key": torch.randn(2, 4, 90, 16, generator=generator),
        "value": torch.randn(2, 4, 90, 32, generator=generator),
        "gates": torch.rand(2, 8, 90, 3, generator=generator),
    }
    made = {name: tensor.to(DEVICE) for name, tensor in made.items()}
    worst = {}
    for combine in ("joint", "gated"):
        names = [name for name in made if combine == "gated" or name != "gates"]
        sizes = CONFIG.replace(combine=combine, compression="mean", branch_kv="shared")
        for label, placement in (("heads", Shard(1)), ("batch", Shard(0)), ("whole", Replicate())):
            whole = {name: made[name].clone().requires_grad_() for name in names}
            spread = {name: distribute_tensor(made[name], mesh, [placement]).requires_grad_() for name in names}
            expected, output = (nsa_attention(**tensors, config=sizes) for tensors in (whole, spread))
            assert isinstance(output, DTensor)
            assert output.placements == (placement,)
            expected.square().sum().backward()
            output.square().sum().backward()
            errors = [(output.full_tensor() - expected).abs().max().item()]
            for name in names:
                assert spread[name].grad.placements == (placement,), (label, name)
                errors.append((spread[name].grad.full_tensor() - whole[name].grad).abs().max().item())
            # Large outputs, without gradients, go through another operator.
            with torch.no_grad(), mock.patch.object(attention, "LARGE_OUTPUT_BYTES", 1):
                early = nsa_attention(**spread, config=sizes)
            assert early.placements == (placement,)
            errors.append((early.full_tensor() - expected).abs().max().item())
            worst[f"{combine} {label}"] = max(errors)
    return worst


CHECKS = {
    check.__name__: check
    for check in (data_parallel, data_parallel_compiled, sharded, sharded_compiled, tensor_parallel)
}


def main(path: str, *names: str) -> None:
    distributed.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    rank = distributed.get_rank()
    results = {name: CHECKS[name](rank) for name in names}
    if rank == 0:
        torch.save(pytree.tree_map_only(Tensor, Tensor.cpu, results), path)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    main(*sys.argv[1:])
