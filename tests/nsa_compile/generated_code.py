"""An attention layer as in Llama, and reading in the code that Inductor generates for it."""

import re

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention as in Llama: grouped heads, rotary positions, a transposed output."""

    def __init__(self, width: int = 96, heads: int = 4, kv_heads: int = 2, size: int = 32) -> None:
        super().__init__()
        self.size = size
        self.q_proj, self.o_proj = nn.Linear(width, heads * size), nn.Linear(heads * size, width)
        self.k_proj, self.v_proj = nn.Linear(width, kv_heads * size), nn.Linear(width, kv_heads * size)

    def forward(self, hidden_states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (each(hidden_states).unflatten(-1, (-1, self.size)).transpose(1, 2) for each in projections)
        query, key = (each * cosine + torch.cat(each.chunk(2, -1)[::-1], -1) * sine for each in (query, key))
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(output.transpose(1, 2).reshape(*hidden_states.shape[:2], -1))


def _calls(code: str) -> list[str]:
    """Lines of the generated code that compute something, in order."""
    body = code[code.index("def call(self") :]
    lines = (line.strip() for line in body.splitlines())
    return [line for line in lines if re.search(r"= torch\.ops\.nsa|^triton_\w+\.run\(|^extern_kernels\.", line)]


def template_kernel(code: str) -> str:
    """The one kernel that attends, made from a template."""
    kernels = [code[match.start() :].partition("'''")[0] for match in re.finditer(r"def triton_tem\w+\(", code)]
    (kernel,) = (each for each in kernels if "attend_range(" in each)
    return kernel


def check_fused(code: str, combine: str) -> None:
    """Between the attention's operators and the output projection stands the template's kernel, and no other."""
    calls = _calls(code)
    body = template_kernel(code)
    name = body.removeprefix("def ").partition("(")[0]
    (position,) = (index for index, call in enumerate(calls) if call.startswith(f"{name}.run("))
    call = calls[position]
    assert body.count("attend_range(") == 1
    buffers = re.findall(r"\bbuf\d+\b", call)
    assert re.search(rf"extern_kernels\.(addmm|mm)\(.*\b{buffers[-1]}\b", calls[position + 1])
    partial = {"gated": ("compressed_attention", "selected_attention"), "joint": ("joint_listed",)}[combine]
    for operator in partial:
        (results,) = re.findall(rf"(buf\d+) = torch\.ops\.nsa\.{operator}\.default", code)
        (output,) = re.findall(rf"(buf\d+) = {results}\[0\]", code)
        readers = [each for each in calls if re.search(rf"\b{output}\b", each)]
        assert readers == [call]
    if combine == "gated":
        assert body.count("tl.sigmoid(") == 3
        assert code.count("tl.sigmoid(") == 3
        # A gate is read once a row, not for every element.
        assert len(re.findall(r"= tl\.load\(.*, row_stored\b", body)) == 3
    # Stores: the lse; what follows the attention; in training what the backward pass needs of the output.
    assert "tl.store(out_ptr" in body
