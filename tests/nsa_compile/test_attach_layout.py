"""Gated inference on long inputs, whose output may lie in another order: what follows still finds the order it had."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional

from nsa_compile import NSAConfig, attach, rewrite
from nsa_compile.kernels import attention

WIDTH, HEADS = 32, 4
CONFIG = NSAConfig(
    block_length=8, block_stride=8, selection_block=8, num_selected=3, window=16, combine="gated", min_keys=0
)


class Attention(nn.Module):
    """Attention by `scaled_dot_product_attention`, or by products whose result is viewed as only one order allows."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self._by_hand = by_hand

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = (
            part(states).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        if self._by_hand:
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=states.device).triu(1)
            heads = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value
            heads = heads.view(-1, *heads.shape[2:]).tanh().view(heads.shape)
        else:
            heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("by_hand", [True, False], ids=["by_hand", "sdpa"])
def test_long_inference_keeps_the_order_that_follows(by_hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Attention(by_hand)
    states = torch.randn(2, 61, WIDTH)
    attach(model, CONFIG, states[:1], start="scratch")
    expected = model(states).detach()
    copies = []

    def count_copies(graph_module: fx.GraphModule, _inputs: list) -> object:
        nodes = list(graph_module.graph.nodes)
        long = next(index for index, node in enumerate(nodes) if node.target is torch.ops.nsa.gated_attention.default)
        copies.append(sum(node.target is torch.ops.aten.clone.default for node in nodes[long:]))
        return graph_module.forward

    def backend(graph_module: fx.GraphModule, inputs: list) -> object:
        assert len(rewrite(graph_module, CONFIG).rewritten) == 1
        return aot_autograd(fw_compiler=count_copies)(graph_module, inputs)

    monkeypatch.setattr(attention, "LARGE_OUTPUT_BYTES", 1)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(states), expected, rtol=1e-4, atol=1e-5)
    # Where the model's own attention lays its result out as ours does, nothing is copied.
    assert copies == [2 if by_hand else 0]
