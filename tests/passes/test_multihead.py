"""torch's own attention modules, which Dynamo keeps as single calls, are opened up."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nsa_compile.passes.sites import Reason

B, T, E, H = 2, 20, 16, 4


def causal_bool() -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def causal_float() -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(T)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention with a mask made in the graph."""

    def __init__(self, mask=causal_bool, call=None, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(E, H, **{"batch_first": True, **options})
        self.mask = mask
        self.call = call or {}

    def forward(self, x: Tensor, **given: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=self.mask(), **self.call, **given)[0]


def inputs(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*(shape or (B, T, E)), requires_grad=True)


MODULES = {
    "bool-mask": SelfAttention(),
    "float-mask": SelfAttention(causal_float),
    "no-weights": SelfAttention(call={"need_weights": False}),
    "is-causal-hint": SelfAttention(call={"need_weights": False, "is_causal": True}),
    "sequence-first": SelfAttention(batch_first=False),
    "no-bias": SelfAttention(bias=False),
    "mask-per-head": SelfAttention(lambda: causal_bool().expand(B * H, T, T)),
    "mask-per-head-viewed": SelfAttention(lambda: causal_float().expand(B, H, T, T).reshape(B * H, T, T)),
}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_module_is_opened_up(rewriting, module, training):
    x = inputs(T, B, E) if module == "sequence-first" else inputs()
    outcome = rewriting.rewrite(MODULES[module].train(training), x, gradients=True)
    outcome.assert_rewritten()
    assert functional.multi_head_attention_forward not in outcome.targets
    assert outcome.decisions[0].place.module == "attention"
    assert outcome.decisions[0].place.spelling == "nn.MultiheadAttention"


def test_unbatched_input_is_opened_up(rewriting):
    rewriting.rewrite(SelfAttention(), inputs(T, E), gradients=True).assert_rewritten()


def test_symbolic_sizes_are_opened_up(rewriting):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, H, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    rewriting.rewrite(Model(), inputs(), dynamic=True).assert_rewritten()


def test_padding_is_passed_on(rewriting):
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 15:] = True
    outcome = rewriting.rewrite(SelfAttention(), inputs(), key_padding_mask=padding)
    outcome.assert_rewritten()
    assert "padding" in outcome.decisions[0].mask


def test_float_padding_from_outside_is_declined(rewriting):
    outcome = rewriting.rewrite(SelfAttention(causal_float), inputs(), key_padding_mask=torch.zeros(B, T))
    outcome.assert_declined(Reason.MASK_IS_INPUT)


def test_float_padding_made_in_the_graph_is_passed_on(rewriting):
    class Model(SelfAttention):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            hidden = torch.arange(T) >= lengths[:, None]
            return super().forward(x, key_padding_mask=torch.zeros(B, T).masked_fill(hidden, -torch.inf))

    rewriting.rewrite(Model(causal_float), inputs(), torch.tensor([15, T])).assert_rewritten()


def test_separate_projections_are_opened_up(rewriting):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, H, kdim=12, vdim=10, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x[..., :12], x[..., :10], attn_mask=causal_bool(), need_weights=False)[0]

    rewriting.rewrite(Model(), inputs(), gradients=True).assert_rewritten()


class Layer(nn.Module):
    """nn.TransformerEncoderLayer under a causal mask."""

    def __init__(self, mask=causal_bool, layers=0, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(E, H, 32, **{"batch_first": True, "dropout": 0.0, **options})
        if layers:
            self.layer = nn.TransformerEncoder(self.layer, layers, enable_nested_tensor=False)
        self.mask = mask

    def forward(self, x: Tensor, **given: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask()
        return self.layer(x, mask, is_causal=mask is not None, **given)


LAYERS = {
    "bool-mask": Layer(),
    "float-mask": Layer(causal_float),
    "norm-first": Layer(norm_first=True),
    "gelu": Layer(activation="gelu"),
    "stack": Layer(layers=2),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_encoder_layer_is_opened_up(rewriting, layer, training):
    outcome = rewriting.rewrite(LAYERS[layer].train(training), inputs(), gradients=training)
    outcome.assert_rewritten(2 if layer == "stack" else 1)
    assert not {functional.multi_head_attention_forward, torch._transformer_encoder_layer_fwd} & set(outcome.targets)


def test_encoder_layer_with_padding_is_opened_up(rewriting):
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 15:] = True
    outcome = rewriting.rewrite(
        Layer().eval(), inputs(), src_key_padding_mask=padding, seen=lambda output: output[:, :15]
    )
    outcome.assert_rewritten()


class Weights(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        output, weights = self.attention(x, x, x, attn_mask=self.mask())
        return output + weights.sum()


class CrossAttention(SelfAttention):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(self.attention.out_proj(x), memory, memory)[0]


DECLINED = {
    "dropout": (Reason.DROPOUT, SelfAttention(dropout=0.1), ()),
    "weights-used": (Reason.ATTENTION_WEIGHTS_USED, Weights(), ()),
    "bias-kv": (Reason.ATTENTION_SINKS, SelfAttention(add_bias_kv=True), ()),
    "zero-attention": (Reason.ATTENTION_SINKS, SelfAttention(add_zero_attn=True), ()),
    "no-mask": (Reason.BIDIRECTIONAL, SelfAttention(lambda: None), ()),
    "mask-per-head": (
        Reason.MASK_DEPENDS_ON_HEAD,
        SelfAttention(
            lambda: (
                (torch.arange(T)[None, None] > torch.arange(T)[:, None] - torch.arange(H)[:, None, None])
                .expand(B, H, T, T)
                .reshape(B * H, T, T)
            )
        ),
        (),
    ),
    "encoder": (Reason.BIDIRECTIONAL, Layer(None), ()),
}


@pytest.mark.parametrize("case", DECLINED)
def test_other_attention_is_declined(rewriting, case):
    reason, module, given = DECLINED[case]
    rewriting.rewrite(module.train(), inputs(), *given).assert_declined(reason)


def test_fused_encoder_without_mask_is_declined(rewriting):
    rewriting.rewrite(Layer(None).eval(), inputs()).assert_declined(Reason.BIDIRECTIONAL)
