"""Masks that models of transformers build: proved to be what their values are, or declined by name."""

import pytest
import torch

from nsa_compile.passes.sites import Reason, Rejection

transformers = pytest.importorskip("transformers")

LENGTH = 24
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
# Name -> (class prefix, configuration).
MODELS = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", {k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "qwen3": ("Qwen3", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 8}),
    "gemma3": ("Gemma3", {**GROUPED, **BOTH}),
    "phi3": ("Phi3", {**{k: v for k, v in GROUPED.items() if k != "head_dim"}, "sliding_window": 8}),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", SIZES),
    "falcon": ("Falcon", {**SIZES, "ffn_hidden_size": 48}),
    "llama4": (
        "Llama4",
        {
            **GROUPED,
            "attention_chunk_size": 8,
            "layer_types": ["chunked_attention", "full_attention"],
            "moe_layers": [1],
            "no_rope_layers": [1, 0],
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
        },
    ),
}


def build(name, spelling="sdpa", **changes):
    prefix, sizes = MODELS[name]
    infix = "Text" if prefix in ("Gemma3", "Llama4") else ""
    settings = {"attn_implementation": spelling, **sizes, **changes}
    config = getattr(transformers, f"{prefix}{infix}Config")(**settings)
    head = "GPT2LMHeadModel" if name == "gpt2" else f"{prefix}ForCausalLM"
    return getattr(transformers, head)(config).eval()


def token_ids():
    return torch.randint(3, 64, (3, LENGTH))


def padding(length=LENGTH):
    """Left padding, right padding, and a hole."""
    mask = torch.ones(3, length, dtype=torch.long)
    mask[0, :5], mask[1, -4:], mask[2, 7] = 0, 0, 0
    return mask


def packed_positions():
    return torch.stack(
        [torch.cat([torch.arange(size) for size in sizes]) for sizes in ((10, 14), (4, 5, 15), (LENGTH,))]
    )


def proofs(oracle, call, **options):
    """The proofs of every attention of the graphs that a call compiles, each checked against the mask's values."""
    recorder = oracle.capture(call, **options)
    found = []
    for graph, inputs in zip(recorder.graphs, recorder.inputs, strict=True):
        for site in oracle.found_sites(graph):
            result = oracle.prove(graph, site)
            if not isinstance(result, Rejection):
                result.check(inputs)
            found.append(result)
    return found


def words(found):
    return [getattr(result, "text", result) for result in found]


FULL, WINDOW = "causal", "causal, window 8"
LAYERS = {
    "mistral": [WINDOW] * 2,
    "phi3": [WINDOW] * 2,
    "gemma3": [WINDOW, FULL],
    "llama4": ["causal, documents", FULL],
}


@pytest.mark.parametrize("name", MODELS)
def test_padded_batches(oracle, name):
    model, ids, mask = build(name), token_ids(), padding()
    found = proofs(oracle, lambda: model(ids, attention_mask=mask))
    assert words(found) == [f"{layer}, padding" for layer in LAYERS.get(name, [FULL] * 2)]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_padded_batches_written_out(oracle, name):
    model, ids, mask = build(name, "eager"), token_ids(), padding()
    found = proofs(oracle, lambda: model(ids, attention_mask=mask))
    assert words(found) == [f"{layer}, padding" for layer in LAYERS.get(name, [FULL] * 2)]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_without_a_cache(oracle, name):
    """Such models tell documents apart by positions that are 0, 1, 2, … here: the documents vanish."""
    model, ids = build(name), token_ids()
    assert words(proofs(oracle, lambda: model(ids, use_cache=False))) == LAYERS.get(name, [FULL] * 2)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_packed_documents_of_any_length(oracle, name):
    model, ids, positions = build(name), token_ids(), packed_positions()
    found = proofs(oracle, lambda: model(ids, position_ids=positions, use_cache=False), dynamic=True)
    layer = "causal, documents, window 8" if name == "mistral" else "causal, documents"
    assert words(found) == [layer] * 2


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padded_batches_of_any_length(oracle, name):
    model, ids, mask = build(name), token_ids(), padding()
    recorder = oracle.capture(lambda i, m: model(i, attention_mask=m), ids, mask, dynamic=True)
    (graph,) = recorder.graphs
    result = oracle.prove(graph, oracle.found_sites(graph)[0])
    assert result.text == f"{LAYERS.get(name, [FULL])[0]}, padding"


STEPS = {
    "one token": (1, None, ["causal from a position"] * 2),
    "one token, padded": (1, 3, ["causal from a position, padding"] * 2),
    "four tokens": (4, None, ["causal from a position"] * 2),
    "four tokens, padded": (4, 3, ["causal from a position, padding"] * 2),
}


@pytest.mark.parametrize("step", STEPS)
def test_static_caches(oracle, step):
    """The cache's length is a tensor that each layer increases in place; the mask reads it before."""
    count, padded, expected = STEPS[step]
    model, ids = build("llama"), token_ids()
    cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        model(ids[:, :16], past_key_values=cache)
    options = {}
    if padded:
        options["attention_mask"] = padding(16 + count)
    found = proofs(oracle, lambda: model(ids[:, 16 : 16 + count], past_key_values=cache, **options))
    assert words(found) == expected


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_tokens_after_a_dynamic_cache(oracle, name):
    model, ids = build(name), token_ids()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :16], past_key_values=cache)
    found = proofs(oracle, lambda: model(ids[:, 16:20], past_key_values=cache))
    window = ", window 8" if name == "mistral" else ""
    assert words(found) == [f"causal from a position{window}"] * 2


def test_masks_are_followed_into_checkpointed_layers(oracle):
    model, ids, mask = build("llama"), token_ids(), padding()
    model.train()
    model.gradient_checkpointing_enable()
    recorder = oracle.capture(lambda: model(ids, attention_mask=mask, use_cache=False), grad=True)
    sites = [(graph, site) for graph in recorder.graphs for site in oracle.found_sites(graph)]
    assert [oracle.prove(*each).text for each in sites] == ["causal, padding"] * 2
    assert all(site.scope.parent is not None for _, site in sites)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_exported_models(oracle, name):
    model, ids, mask = build(name), token_ids(), padding()
    options = {"attention_mask": mask, "use_cache": False}
    graph = torch.export.export(model, (ids,), options, strict=False).graph_module
    found = [oracle.prove(graph, site) for site in oracle.found_sites(graph)]
    assert words(found) == [f"{layer}, padding" for layer in LAYERS.get(name, [FULL] * 2)]


def reasons(call, oracle):
    return {result.reason for result in proofs(oracle, call)}


def test_a_slope_for_each_head_is_declined(oracle):
    sizes = {**SIZES, "ffn_hidden_size": 48, "alibi": True, "multi_query": False}
    config = transformers.FalconConfig(**sizes, attn_implementation="sdpa")
    model, ids, mask = transformers.FalconForCausalLM(config).eval(), token_ids(), padding()
    assert reasons(lambda: model(ids, attention_mask=mask), oracle) == {Reason.ALIBI}


def test_relative_positions_that_are_learned_are_declined(oracle):
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model, ids = transformers.T5EncoderModel(config).eval(), token_ids()
    assert reasons(lambda: model(ids), oracle) == {Reason.LEARNED_BIAS}


def test_encoders_are_declined(oracle):
    sizes = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
    config = transformers.BertConfig(**sizes, max_position_embeddings=64, attn_implementation="sdpa")
    model, ids, mask = transformers.BertModel(config).eval(), token_ids(), padding()
    assert reasons(lambda: model(ids, attention_mask=mask), oracle) == {Reason.BIDIRECTIONAL}


def test_a_mask_that_the_caller_makes_is_declined(oracle):
    model, ids = build("llama"), token_ids()
    mask = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    assert reasons(lambda: model(ids, attention_mask=mask), oracle) == {Reason.MASK_IS_INPUT}


# Names that configurations use for sizes; what a configuration knows of them is made small.
SMALL = {
    **GROUPED,
    "d_model": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_layers": 2, "num_heads": 4,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 2, "ffn_dim":
    48, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_ff": 48, "d_kv": 8, "rotary_dim": 4, "n_inner":
    48, "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace":
    1, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "word_embed_proj_dim": 32, "sliding_window": 8, "bos_token_id": 1, "eos_token_id": 2, "embedding_size": 32,
    "ffn_hidden_size": 48, "max_seq_len": 64, "n_heads": 4, "n_layers": 2, "shared_expert_intermediate_size":
    16, "decoder_start_token_id": 1, "attention_dropout": 0.0,
}  # fmt: skip


def small_model(config_class, spelling):
    """A causal model of a configuration with few parameters; None where sizes alone do not make one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    ids, mask = token_ids(), padding()
    try:
        known = {key: value for key, value in SMALL.items() if getattr(config_class(), key, None) is not None}
        config = config_class(**known)
        config._attn_implementation = spelling
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            parameters = sum(p.numel() for p in model_class(config).parameters())
        if parameters > 5e6:
            return None
        model = model_class(config).eval()
        with torch.no_grad():
            model(ids, attention_mask=mask)
    except Exception:  # noqa: BLE001  (many configurations need more than sizes)
        return None
    return model


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["sdpa", "eager"])
def test_every_causal_model(oracle, spelling):
    """Whatever is proved in any model that a small configuration builds is what the mask's values are."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    proved, ids, mask = 0, token_ids(), padding()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = small_model(CONFIG_MAPPING[name], spelling)
        if model is None:
            continue
        found = proofs(oracle, lambda model=model: model(ids, attention_mask=mask))
        proved += sum(not isinstance(result, Rejection) for result in found)
        # A long test shows how far it is.
        print(name, sorted({getattr(r, "text", None) or f"{r.reason.name}: {r.sentence}" for r in found}))  # noqa: T201
    assert proved > 50
