"""What every training run needs: compilation, the optimizer and its schedule, autocast, the loss in chunks, a clock."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsa_compile import NSABackend, NSAConfig, rewrite

# A vocabulary is large: logits are made for this many positions at a time.
_CHUNK = 2048


def backend_for(config: NSAConfig | None, eager: bool) -> Any:
    """Returns a backend for `torch.compile`.

    Args:
        config: of NSA; None for dense attention.
        eager: run the graphs as they are, rewritten but not compiled: slower, and starts at once.
    """
    if not eager:
        return "inductor" if config is None else NSABackend(config)

    def run_rewritten(graph_module: torch.fx.GraphModule, _example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if config is not None:
            rewrite(graph_module, config)
        return graph_module.forward

    return run_rewritten


def compile_layers(layers: Iterable[nn.Module], backend: Any, mode: str | None = None) -> None:
    """Compiles each layer by itself, in place.  Layers are alike, so one graph serves all and is compiled once.

    Args:
        layers: the layers.
        backend: what `backend_for` returned.
        mode: of `torch.compile`.  With "reduce-overhead" layers run as CUDA graphs: up to 16,384 tokens or so a step of
            one sequence otherwise waits for the launches of its kernels.
    """
    for layer in layers:
        layer.compile(backend=backend, dynamic=False, mode=mode)


def optimizer_for(model: nn.Module, rate: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """Returns AdamW, with decay on matrices alone, and its schedule: a linear rise, then half a cosine."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=parameters[0].is_cuda)
    rise = max(1, min(100, steps // 10))
    parts = [
        torch.optim.lr_scheduler.LinearLR(adamw, 0.01, 1.0, rise),
        torch.optim.lr_scheduler.CosineAnnealingLR(adamw, max(1, steps - rise), rate / 10),
    ]
    return adamw, torch.optim.lr_scheduler.SequentialLR(adamw, parts, [rise])


def autocast(device: str | torch.device) -> torch.autocast:
    """bfloat16 for the matrix products on a GPU, the model's own dtype elsewhere."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def next_token_loss(
    decode: Callable[[Tensor], Tensor], project: Callable[[Tensor], Tensor], sequences: Tensor
) -> Tensor:
    """Computes the mean negative log-likelihood of each token after the first, nats.

    CUDA graphs begin anew: what an earlier call left in their memory, gradients too, has to be used up by then.

    Args:
        decode: from tokens `[B, T]` to hidden states `[B, T, C]`.
        project: from hidden states to logits.
        sequences: `[B, T + 1]`.
    """
    torch.compiler.cudagraph_mark_step_begin()
    with autocast(sequences.device):
        # In strides as the tokens of `likeliest` have: for others `decode` would be compiled anew.
        states = decode(sequences[:, :-1].clone(memory_format=torch.contiguous_format))
        parts = zip(states.split(_CHUNK, 1), sequences[:, 1:].split(_CHUNK, 1), strict=True)
        total = torch.stack([_summed_loss(project(part), wanted) for part, wanted in parts]).sum()
    return total / sequences[:, 1:].numel()


def likeliest(decode: Callable[[Tensor], Tensor], project: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Returns the likeliest next token at each position of `[B, T]`."""
    torch.compiler.cudagraph_mark_step_begin()
    with autocast(tokens.device):
        return torch.cat([project(part).argmax(-1) for part in decode(tokens).split(_CHUNK, 1)], 1)


def _summed_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="sum")


_START = time.perf_counter()


def progress(message: str) -> None:
    """Prints what is being done, and for how long the program has run."""
    print(f"[{time.perf_counter() - _START:6.1f} s] {message}", flush=True)
