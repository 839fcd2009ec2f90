"""The backend object: options, equality, what it hands to Inductor, errors, logs."""

import copy
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

import nsa_compile
from nsa_compile import NSABackend, NSAConfig, collect_reports, compat, nsa_backend, rewriting
from nsa_compile.errors import ConfigError, InternalError, UnknownOptionError

ROOT = Path(nsa_compile.__file__).parents[1]
# Selects everything at the lengths of these tests, so that joint mode equals full attention.
COVERING = NSAConfig(block_length=4, block_stride=4, selection_block=8, num_selected=64, window=8, min_keys=0)
SPARSE = COVERING.replace(num_selected=3)


class Attention(nn.Module):
    def __init__(self, is_causal=True):
        super().__init__()
        self.project = nn.Linear(32, 64)
        self.is_causal = is_causal

    def forward(self, x):
        query, key, value = self.project(x).split([32, 16, 16], dim=-1)
        query, key, value = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (query, key, value))
        output = scaled_dot_product_attention(query, key, value, is_causal=self.is_causal, enable_gqa=True)
        return output.transpose(1, 2).flatten(-2) + x


@pytest.fixture
def inductor(monkeypatch):
    """Runs rewritten graphs as they are, and collects what Inductor would have been called with."""
    calls = []

    def compile_with_inductor(graph_module, example_inputs, patches):
        calls.append(dict(patches))
        return graph_module.forward

    monkeypatch.setattr(compat, "compile_with_inductor", compile_with_inductor)
    return calls


def tokens(length=48):
    return torch.randn(2, length, 32)


class CountedPass:
    """A user's pass over the joint graph; no two are alike, so that no cached graph stands in for its run."""

    def __init__(self):
        self.operators = set()
        self._uuid = str(uuid.uuid4())

    def __call__(self, graph):
        self.operators |= {str(node.target) for node in graph.nodes}

    def uuid(self):
        return self._uuid


def test_training_through_inductor_equals_dense():
    model, x = Attention(), tokens().requires_grad_()
    dense = model(x)
    expected = torch.autograd.grad(dense.square().sum(), (x, *model.parameters()))
    own_pass = CountedPass()
    options = {"joint_custom_pre_pass": own_pass, "nsa.num_selected": 64}
    with collect_reports() as reports:
        compiled = torch.compile(model, backend=NSABackend(SPARSE), options=options, fullgraph=True)
        output = compiled(x)
        gradients = torch.autograd.grad(output.square().sum(), (x, *model.parameters()))
    assert [report.summary for report in reports] == ["1 of 1 attention rewritten"]
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)
    assert {"nsa.joint_attention.default", "nsa.joint_attention_backward.default"} <= own_pass.operators
    assert not any("scaled_dot_product" in name for name in own_pass.operators)


def test_two_models_two_configs_and_plain_inductor_in_one_process():
    model, x = Attention(), tokens()
    with torch.no_grad():
        dense = model(x)
        covering = torch.compile(model, backend=NSABackend(COVERING))(x)
        sparse = torch.compile(copy.deepcopy(model), backend=NSABackend(SPARSE))(x)
        plain = torch.compile(model)(x)
    torch.testing.assert_close(covering, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain, dense, rtol=1e-4, atol=1e-5)
    assert (sparse - dense).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"mode": "default"}, {}),
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        ({"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True, "coordinate_descent_tuning": True}),
        ({"options": {"max_autotune": True, "nsa.window": 16}}, {"max_autotune": True}),
        ({"options": {"triton.cudagraphs": True}}, {"triton.cudagraphs": True}),
    ],
    ids=str,
)
def test_mode_and_options_reach_inductor(inductor, given, expected):
    torch.compile(Attention(), backend=nsa_backend, **given)(tokens())
    (patches,) = inductor
    assert patches.pop("joint_custom_pre_pass").uuid()[0] == "nsa_compile"
    assert patches == expected


def test_options_override_the_mode_when_called_directly(inductor):
    graph_module = torch.fx.symbolic_trace(torch.nn.ReLU())
    nsa_backend(graph_module, [torch.ones(2)], mode="max-autotune", options={"triton.cudagraphs": False})
    assert (inductor[0]["max_autotune"], inductor[0]["triton.cudagraphs"]) == (True, False)


def test_nsa_options_change_single_fields(inductor):
    options = {"nsa.window": 16, "nsa.min_keys": 4}
    backend = NSABackend(SPARSE)
    with collect_reports() as reports:
        torch.compile(Attention(), backend=backend, options=options)(tokens())
    assert reports[0].config == SPARSE.replace(window=16, min_keys=4)
    assert inductor[0]["joint_custom_pre_pass"].config == reports[0].config
    assert backend.config == SPARSE
    assert options == {"nsa.window": 16, "nsa.min_keys": 4}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nsa.windw": 1}, UnknownOptionError, r"'windw' is unknown; the options are block_length, .*window"),
        ({"nsa.": 1}, UnknownOptionError, "is unknown"),
        ({"nsa.window": 0}, ConfigError, "window=0 is not accepted"),
        ({"nsa.window": 16, "max_autotun": True}, RuntimeError, "Unexpected optimization option max_autotun"),
    ],
    ids=str,
)
def test_wrong_options_raise_their_own_error(inductor, options, error, message):
    with pytest.raises(error, match=message):
        torch.compile(Attention(), backend=nsa_backend, options=options)(tokens())
    assert not inductor


def test_config_must_be_a_config():
    with pytest.raises(ConfigError, match="config is a dict; give an NSAConfig"):
        NSABackend({"window": 16})


def test_backends_are_equal_by_config():
    assert NSABackend() == nsa_backend == NSABackend(NSAConfig())
    assert hash(NSABackend(SPARSE)) == hash(NSABackend(copy.copy(SPARSE)))
    assert NSABackend(SPARSE) != NSABackend(COVERING)
    assert NSABackend() != "nsa"
    assert len({NSABackend(), nsa_backend, NSABackend(SPARSE)}) == 2


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_backends_can_be_copied_and_pickled(copied):
    assert copied(NSABackend(SPARSE)) == NSABackend(SPARSE)


def test_backends_take_attributes_and_keep_their_config():
    backend = NSABackend(SPARSE)
    backend._tags = ("tag",)
    with pytest.raises(AttributeError):
        backend.config = COVERING
    assert repr(backend).startswith("NSABackend(NSAConfig(block_length=4")


def test_compile_config_of_transformers_keeps_the_backend():
    transformers = pytest.importorskip("transformers")
    config = transformers.CompileConfig(backend=NSABackend(SPARSE), options={"nsa.window": 16}, mode=None)
    assert config.to_dict()["backend"] == NSABackend(SPARSE)


@pytest.mark.parametrize(("second", "compilations"), [(SPARSE, 1), (COVERING, 2)], ids=["equal", "different"])
def test_equal_configs_compile_once(inductor, second, compilations):
    model, x = Attention(), tokens()
    torch.compile(model, backend=NSABackend(SPARSE))(x)
    torch.compile(model, backend=NSABackend(copy.copy(second)))(x)
    assert len(inductor) == compilations


def test_a_graph_without_attention_goes_to_inductor(inductor):
    with collect_reports() as reports:
        torch.compile(nn.Linear(4, 4), backend=nsa_backend)(torch.ones(2, 4))
    assert len(inductor) == 1
    assert reports[0].sites == ()


def test_dynamic_lengths_recompile_only_across_min_keys(inductor):
    model = torch.compile(Attention(), backend=NSABackend(SPARSE.replace(min_keys=32)), dynamic=True, fullgraph=True)
    with collect_reports() as reports:
        for length in (48, 33, 100, 64, 20, 31, 7, 200):
            model(tokens(length))
    assert [len(report.rewritten) for report in reports] == [1, 0]
    assert reports[1].sites[0].reason == "TOO_SHORT"


def test_no_graph_break_is_added(inductor):
    counters.clear()
    torch.compile(Attention(), backend=nsa_backend)(tokens())
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "failure", [KeyError("lost"), torch._subclasses.fake_tensor.UnsupportedFakeTensorException("fake")]
)
def test_a_failing_pass_raises_and_does_not_break_the_graph(inductor, monkeypatch, failure, caplog):
    def fail(*_):
        raise failure

    monkeypatch.setattr(rewriting, "find_sites", fail)
    with pytest.raises(InternalError, match=f"{type(failure).__name__}: .*\n.*bug of nsa_compile"):
        torch.compile(Attention(), backend=nsa_backend)(tokens())
    assert "a pass failed on this graph" in caplog.text
    assert "Traceback" in caplog.text
    assert not inductor


@pytest.mark.parametrize(
    ("model", "config", "level", "message"),
    [
        (Attention(), SPARSE, logging.INFO, "1 of 1 attention rewritten"),
        (Attention(), NSAConfig(), logging.INFO, "0 of 1 attention rewritten; declined: 1 TOO_SHORT"),
        (
            Attention(is_causal=False),
            SPARSE,
            logging.WARNING,
            "0 of 1 attention rewritten; declined: 1 BIDIRECTIONAL",
        ),
        (nn.Linear(32, 32), SPARSE, logging.INFO, "no attention in this graph"),
    ],
    ids=["rewritten", "too short", "declined", "none"],
)
def test_outcome_is_logged(inductor, caplog, model, config, level, message):
    with caplog.at_level(logging.INFO, logger="nsa_compile"):
        torch.compile(model, backend=NSABackend(config))(tokens())
    records = [(record.levelno, record.message) for record in caplog.records if record.name == "nsa_compile.backend"]
    assert records == [(level, message)]


def test_report_and_graphs_are_logged_for_debugging(inductor, caplog):
    with caplog.at_level(logging.DEBUG, logger="nsa_compile"):
        torch.compile(Attention(), backend=NSABackend(SPARSE))(tokens())
    assert "F.scaled_dot_product_attention  causal" in caplog.text
    assert "torch.ops.nsa.attention" in caplog.text


def test_reports_are_collected_where_asked_for(inductor):
    def compile_it():
        torch.compile(Attention(), backend=nsa_backend)(tokens())

    with collect_reports() as outer:
        with collect_reports() as inner:
            compile_it()
        thread = threading.Thread(target=compile_it)
        thread.start()
        thread.join()
    compile_it()
    assert (len(outer), len(inner)) == (0, 1)
    assert "scaled_dot_product_attention" in inner[0].graphs[0].before


def test_reset_forgets_cuda_graphs_where_there_are_any(monkeypatch):
    trees = type(sys)("trees")
    trees.calls = 0

    def reset_cudagraph_trees():
        trees.calls += 1

    trees.reset_cudagraph_trees = reset_cudagraph_trees
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    nsa_backend.reset()
    monkeypatch.delitem(sys.modules, "torch._inductor.cudagraph_trees")
    nsa_backend.reset()
    assert trees.calls == 1


BY_NAME = """
import torch
assert "nsa" in torch._dynamo.list_backends()
compiled = torch.compile(lambda x: x.relu() + 1, backend="nsa", options={"nsa.wrong": 1})
try:
    compiled(torch.ones(3))
except ValueError as error:
    print(type(error).__name__)
"""


def test_name_of_the_entry_point(tmp_path):
    """backend="nsa" works with nothing imported, by the entry point of pyproject.toml."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    (entry,) = re.findall(r'entry-points."torch_dynamo_backends"\]\n(\w+) = "(.+)"', pyproject)
    installed = tmp_path / "nsa_compile-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: nsa-compile\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{entry[0]} = {entry[1]}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", BY_NAME]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["UnknownOptionError"]


def test_trace_gets_report_and_graphs(tmp_path):
    """TORCH_TRACE is read when torch is imported, hence a process."""
    script = (
        "import torch, torch.nn.functional as F\n"
        "from nsa_compile import NSABackend, NSAConfig, compat\n"
        "compat.compile_with_inductor = lambda graph_module, *_: graph_module.forward\n"
        "attend = lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)\n"
        "torch.compile(attend, backend=NSABackend(NSAConfig(min_keys=0)))(torch.ones(1, 2, 32, 8))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True, timeout=300)
    trace = "".join(path.read_text() for path in tmp_path.iterdir())
    assert all(f'"name": "{name}"' in trace for name in ("nsa_report", "nsa_graph_before", "nsa_graph_after"))
    assert "torch.ops.nsa.attention" in trace
