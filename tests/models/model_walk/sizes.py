"""Small configurations of any model of transformers, from the names that configurations use for sizes."""

from typing import Any

# Tokens of a vocabulary, of a sliding window and of a chunk.
VOCABULARY, WINDOW = 64, 8

# Sizes by the names that configurations have for them: hidden size 32, 4 heads in 2 groups, 2 layers, 4 experts.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "emb_dim", "dim_model"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "projection_dim", "encoder_hidden_size", "decoder_hidden_size", "dim"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "num_attn_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "v_head_dim", "qk_nope_head_dim", "dim_head"), 8),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("encoder_num_hidden_layers", "text_num_hidden_layers"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "dff", "dim_ff", "encoder_intermediate_size"), 48),
    **dict.fromkeys(("decoder_intermediate_size",), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_source_positions"), 64),
    **dict.fromkeys(("max_target_positions", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("q_lora_rank",), 12),
    **dict.fromkeys(("kv_lora_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    "qk_head_dim": 12,
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "local_attention", "window_size"), WINDOW),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("eos_token_id",), 2),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("num_mel_bins",), 16),
}

# Sizes that a model has only where its default configuration gives a number for them.
_ONLY_WHERE_SET = frozenset(
    (
        "q_lora_rank", "head_dim", "hidden_size_per_layer_input", "shared_expert_intermediate_size", "v_head_dim",
        "n_shared_experts", "num_key_value_heads", "num_kv_heads", "num_experts", "num_experts_per_tok", "n_inner",
        "moe_intermediate_size", "sliding_window", "attention_chunk_size", "rotary_dim", "num_local_experts",
    )
)  # fmt: skip

_NOTHING = object()


def small_settings(config_class: type, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns arguments for which a configuration class makes a small configuration.

    Args:
        config_class: the class; parts (text, vision, audio) are made small too.
        changes: what has to be otherwise; a value None removes the argument.
    """
    base = config_class()
    settings: dict[str, Any] = {}
    for name, value in SIZES.items():
        default = _default(base, name, value)
        if default is _NOTHING or _is_read_only(config_class, name):
            continue
        if isinstance(default, list | tuple | dict) or (default is None and name in _ONLY_WHERE_SET):
            continue
        settings[name] = value
    for alias, field in getattr(config_class, "attribute_map", {}).items():
        if alias in settings and field in settings:
            del settings[alias]
    settings |= _layers(base)
    if _default(base, "kv_lora_rank") is not _NOTHING:
        settings["num_key_value_heads"] = 4
        settings.pop("head_dim", None)
    if hasattr(base, "use_mamba_kernels"):
        settings["use_mamba_kernels"] = False
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(base, name, None)
        if part is not None and not isinstance(part, dict):
            settings[name] = {**small_settings(type(part)), "model_type": part.model_type}
    for name, value in (changes or {}).items():
        if value is None:
            settings.pop(name, None)
        elif isinstance(value, dict) and isinstance(settings.get(name), dict):
            settings[name] = settings[name] | value
        else:
            settings[name] = value
    return settings


def _default(base: Any, name: str, per_layer: Any = True) -> Any:
    """A configuration's value; `_NOTHING` where it has none, `per_layer` where each layer has its own."""
    try:
        return getattr(base, name, _NOTHING)
    except RuntimeError:
        return per_layer


def _is_read_only(config_class: type, name: str) -> bool:
    name = getattr(config_class, "attribute_map", {}).get(name, name)
    found = getattr(config_class, name, None)
    return isinstance(found, property) and found.fset is None


def _layers(base: Any) -> dict[str, Any]:
    """One layer of each kind, and at least two."""
    kinds = getattr(base, "layer_types", None)
    if not kinds or _is_read_only(type(base), "layer_types"):
        return {}
    distinct = list(dict.fromkeys(kinds))
    settings: dict[str, Any] = {"layer_types": (distinct * 2)[: max(2, len(distinct))]}
    settings["num_hidden_layers"] = len(settings["layer_types"])
    feed_forward = getattr(base, "mlp_layer_types", None)
    if feed_forward:
        settings["mlp_layer_types"] = ([feed_forward[0], feed_forward[-1]] * 2)[: settings["num_hidden_layers"]]
    return settings
