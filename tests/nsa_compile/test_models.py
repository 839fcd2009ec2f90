"""Models of transformers, compiled with joint mode that covers every key: they equal their dense selves.

The graphs run through AOTAutograd without Inductor (`aot_eager`), which is what the rewrite can get wrong, and takes
seconds; one model goes all the way.
"""

import functools

import pytest
import torch
from torch._dynamo import lookup_backend

from nsa_compile import NSABackend, NSAConfig, RewriteReport, collect_reports, compat

transformers = pytest.importorskip("transformers")

# Selects everything at the lengths of these tests, so that joint mode equals full attention.
COVERING = NSAConfig(block_length=4, block_stride=4, selection_block=8, num_selected=16, window=8, min_keys=0)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
MODELS = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 12}),
    "gemma": ("Gemma", {**SIZES, "num_key_value_heads": 1, "head_dim": 8}),
    "gpt2": ("GPT2", {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_positions": 256}),
    "gpt_neox": ("GPTNeoX", SIZES),
}


def build(name, layers=2, **changes):
    prefix, sizes = MODELS[name]
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}
    fixed = {"attn_implementation": "sdpa", "use_cache": False, "num_hidden_layers": layers}
    settings = {**fixed, **sizes, **dropout, **changes}
    config = getattr(transformers, f"{prefix}Config")(**settings)
    head = "GPT2LMHeadModel" if name == "gpt2" else f"{prefix}ForCausalLM"
    return getattr(transformers, head)(config).eval()


def token_ids(batch=2, length=40):
    return torch.randint(3, 64, (batch, length))


def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return mask


@pytest.fixture
def without_inductor(monkeypatch):
    def compile_with_inductor(graph_module, example_inputs, patches):
        return lookup_backend("aot_eager")(graph_module, example_inputs)

    monkeypatch.setattr(compat, "compile_with_inductor", compile_with_inductor)


def compiled(model, **options):
    return torch.compile(model, backend=NSABackend(COVERING), **options)


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_all_rewritten(reports: list[RewriteReport], count=2):
    sites = [site for report in reports for site in report.sites]
    assert [site.decision for site in sites] == ["rewritten"] * count, "\n".join(map(str, reports))


@pytest.mark.parametrize("name", MODELS)
def test_inference(without_inductor, name):
    model, ids = build(name), token_ids()
    with torch.no_grad(), collect_reports() as reports:
        sparse = compiled(model, fullgraph=True)(input_ids=ids).logits
        torch.testing.assert_close(sparse, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert_all_rewritten(reports)
    assert reports[0].sites[0].mask.startswith("causal")


@pytest.mark.parametrize("name", MODELS)
def test_left_padded_training(without_inductor, name):
    model, ids = build(name).train(), token_ids()
    mask = left_padded(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    dense = model(**inputs)
    dense.loss.backward()
    expected = gradients(model)
    with collect_reports() as reports:
        sparse = compiled(model)(**inputs)
    sparse.loss.backward()
    assert_all_rewritten(reports)
    assert "padding" in reports[0].sites[0].mask
    valid = mask.bool()
    torch.testing.assert_close(sparse.logits[valid], dense.logits[valid], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse.loss, dense.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_dynamic_lengths(without_inductor, name):
    model = build(name, layers=1)
    run = compiled(model, fullgraph=True, dynamic=True)
    with torch.no_grad(), collect_reports() as reports:
        for batch, length in ((2, 40), (3, 57), (2, 96)):
            ids = token_ids(batch, length)
            mask = left_padded(ids)
            logits = run(input_ids=ids, attention_mask=mask).logits
            expected = model(input_ids=ids, attention_mask=mask).logits
            valid = mask.bool()
            torch.testing.assert_close(logits[valid], expected[valid], rtol=1e-4, atol=1e-5)
    # Dynamo may call a backend twice for the first graph; further lengths must not compile again.
    assert len(reports) <= 2
    assert_all_rewritten(reports, len(reports))


def test_packed_documents(without_inductor):
    model, ids = build("llama"), token_ids(1, 40)
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    with torch.no_grad(), collect_reports() as reports:
        packed = compiled(model, fullgraph=True)(input_ids=ids, position_ids=positions).logits
        torch.testing.assert_close(packed, model(input_ids=ids, position_ids=positions).logits, rtol=1e-4, atol=1e-5)
        alone = model(input_ids=ids[:, 15:]).logits
    assert_all_rewritten(reports)
    torch.testing.assert_close(packed[:, 15:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing(without_inductor):
    model, ids = build("llama").train(), token_ids()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids, labels=ids).loss.backward()
    expected = gradients(model)
    with collect_reports() as reports:
        compiled(model)(input_ids=ids, labels=ids).loss.backward()
    assert_all_rewritten(reports)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-5)


def test_autocast(without_inductor):
    model, ids = build("llama"), token_ids()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), collect_reports() as reports:
        sparse = compiled(model, fullgraph=True)(input_ids=ids).logits
        dense = model(input_ids=ids).logits
    assert_all_rewritten(reports)
    assert sparse.dtype == dense.dtype
    torch.testing.assert_close(sparse, dense, rtol=2e-2, atol=2e-2)


def test_dropout_in_training_is_declined(without_inductor):
    model, ids = build("llama", attention_dropout=0.1).train(), token_ids()
    with collect_reports() as reports:
        compiled(model)(input_ids=ids)
    assert {site.reason for report in reports for site in report.sites} == {"DROPOUT"}


def test_training_through_inductor():
    model, ids = build("llama", layers=1).train(), token_ids()
    inputs = {"input_ids": ids, "attention_mask": left_padded(ids), "labels": ids}
    expected_loss = model(**inputs).loss
    expected_loss.backward()
    expected = gradients(model)
    with collect_reports() as reports:
        loss = compiled(model, fullgraph=True)(**inputs).loss
    loss.backward()
    assert_all_rewritten(reports, 1)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["model.compile", "compile_config"])
def test_generate(without_inductor, how):
    """`torch.compile(model).generate` compiles nothing; these two ways do."""
    model, ids = build("llama", use_cache=True), token_ids(2, 24)
    generate = functools.partial(model.generate, ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = generate()
    with collect_reports() as reports:
        if how == "model.compile":
            model.compile(backend=NSABackend(COVERING))
            tokens = generate()
        else:
            settings = transformers.CompileConfig(backend=NSABackend(COVERING), fullgraph=False, mode=None)
            settings._compile_all_devices = True
            tokens = generate(cache_implementation="static", compile_config=settings)
    assert reports
    assert any(report.sites for report in reports)
    torch.testing.assert_close(tokens, expected)
