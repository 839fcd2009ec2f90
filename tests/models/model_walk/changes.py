"""What single models need beside small sizes: settings that belong together, or that have no default that works."""

from typing import Any

_HEADS = {"head_dim": 8, "num_key_value_heads": 2}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}

# Model type -> changes of its small settings; None removes one.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "dots1": {**_HEADS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"per_layer_config": {}},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {**_SLIDING, "num_kv_shared_layers": 0, "intermediate_size": [48, 48],
                     "activation_sparsity_pattern": [0.5, 0.0]},
    "gemma4_text": {**_SLIDING, "per_layer_config": {}},
    "gemma4_unified_text": {**_SLIDING, "per_layer_config": {}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "longcat_flash": {"head_dim": 4, "num_attention_heads": 4, "num_key_value_heads": 4},
    "ministral": _HEADS,
    "nemotron": _HEADS,
    "prophetnet": {"num_hidden_layers": None, "num_layers": None},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "reformer": {"is_decoder": True},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "xlnet": {"max_position_embeddings": None, "d_inner": 48, "d_head": 8},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Walks that look only at rows which see no key, so that nobody minds what attention gives there: why that is so.
BLIND = {
    ("gpt_neo", "eager", "one token, static cache"): "it counts its window from the end of the cache, not of the text"
}

# Walks whose outputs differ from the dense model's although nothing is rewritten: why that is so.
NOISY = {("phimoe", "sdpa", "checkpointing"): "its router draws noise, and Dynamo alone draws another"}
