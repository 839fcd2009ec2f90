"""Attentions inside operators that cannot be opened: they are named, and stay."""

import re

from torch import fx, nn

from nsa_compile.passes.calls import operation
from nsa_compile.passes.metadata import place_of
from nsa_compile.passes.predicate.writes import Writes
from nsa_compile.passes.scopes import attribute_of
from nsa_compile.passes.sites import Reason, Rejection, Scope

_FUSED = re.compile(
    r"_scaled_dot_product_(?!.*backward).*attention.*|_?flash_attn_.*func|_flash_attention_forward"
    r"|_efficient_attention_forward|memory_efficient_attention|_native_multi_head_attention|varlen_attn"
)
# Modules of torch's own that `symbolic_trace` leaves whole.
_MODULES = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Transformer)


def is_fused_attention(node: fx.Node) -> bool:
    """Tells whether a node calls an attention that hides its products."""
    if node.op == "call_module":
        return isinstance(attribute_of(node.graph.owning_module, str(node.target)), _MODULES)
    return node.op == "call_function" and _FUSED.fullmatch(operation(node)) is not None


def read_fused_attention(node: fx.Node, scope: Scope, _: Writes) -> Rejection:
    """Declines a fused attention, and says what to do instead."""
    if node.op == "call_module":
        name = type(attribute_of(scope.graph_module, str(node.target))).__name__
        sentence = f"symbolic_trace leaves nn.{name} whole; torch.compile and torch.export open it."
    else:
        name = operation(node)
        sentence = f"{name} hides its products; torch's scaled_dot_product_attention can be rewritten."
    return Rejection(Reason.FUSED_ATTENTION, sentence, (node,), place_of(node, scope, name))
