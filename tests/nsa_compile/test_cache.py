"""The cache key: what changes compiled code changes the key, and nothing else does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nsa_compile
from nsa_compile import NSAConfig
from nsa_compile.cache import CacheKey, hash_sources, source_hash, with_cache_key

ROOT = Path(nsa_compile.__file__).parents[1]

# Compiles one attention per configuration in a process, and prints how often each cache was hit.
SCRIPT = """
import json, sys, unittest.mock
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from nsa_compile import NSABackend, NSAConfig, cache

def attention(x):
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)

def hits_and_misses(min_keys, source):
    torch._dynamo.reset()
    counters.clear()
    config = NSAConfig(block_length=4, block_stride=4, selection_block=4, num_selected=4, window=8, min_keys=min_keys)
    with unittest.mock.patch.object(cache, "source_hash", lambda: source):
        torch.compile(attention, backend=NSABackend(config))(torch.ones(1, 2, 32, 8))
    return {name: counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss", "bypass")}

print(json.dumps([hits_and_misses(min_keys, source) for min_keys, source in json.loads(sys.argv[1])]))
"""


def run_script(cache_dir: Path, *cases):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(cache_dir),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


def test_compiled_code_is_reused_only_by_the_same_sources_and_config(tmp_path):
    hit, miss = {"hit": 1, "miss": 0, "bypass": 0}, {"hit": 0, "miss": 1, "bypass": 0}
    assert run_script(tmp_path, (0, "sources")) == [miss]
    # In another process: the same; another config that gives the same graph; changed sources; the same again.
    assert run_script(tmp_path, (0, "sources"), (1, "sources"), (0, "changed"), (0, "sources")) == [
        hit,
        miss,
        miss,
        hit,
    ]


@pytest.fixture
def package(tmp_path):
    """A package whose kernels are a link, as in the repository."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "kernel.py").write_text("TILE = 64\n")
    package = tmp_path / "package"
    package.mkdir()
    (package / "backend.py").write_text("pass\n")
    (package / "kernels").symlink_to("../kernels")
    return package


@pytest.mark.parametrize(
    ("name", "content", "changes"),
    [
        ("backend.py", "pass  # changed\n", True),
        ("kernels/kernel.py", "TILE = 128\n", True),
        ("kernels/new.py", "", True),
        ("kernels/template.jinja", "{{ size }}", True),
        ("NOTES.md", "text", False),
        ("__pycache__/backend.pyc", "bytes", False),
    ],
)
def test_hash_covers_every_source_file(package, name, content, changes):
    before = hash_sources(package)
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_text(content)
    assert (hash_sources(package) != before) == changes


def test_hash_tells_where_one_file_ends(package):
    before = hash_sources(package)
    (package / "backend.py").rename(package / "backend2.py")
    assert hash_sources(package) != before


def test_hash_of_a_package_that_is_not_on_disk_is_empty(tmp_path):
    assert hash_sources(tmp_path / "archive.zip" / "package") == ""


def test_source_hash_covers_passes_and_kernels():
    folder = Path(nsa_compile.__file__).parent
    assert source_hash() == hash_sources(folder)
    assert (folder / "passes" / "find.py").is_file()
    assert (folder / "kernels" / "operators.py").is_file()


class Numbered:
    """A user's pass with a key."""

    def __init__(self, number):
        self.number = number
        self.graphs = []

    def __call__(self, graph):
        self.graphs.append(graph)

    def uuid(self):
        return self.number


def test_key_composes_with_the_users_own_passes():
    first, second = Numbered(1), Numbered(2)
    patches = with_cache_key({"joint_custom_pre_pass": [first, second], "max_autotune": True}, NSAConfig())
    key = patches["joint_custom_pre_pass"]
    assert patches["max_autotune"] is True
    graph = torch.fx.Graph()
    key(graph)
    assert first.graphs == second.graphs == [graph]
    assert key.uuid() == CacheKey(NSAConfig(), (Numbered(1), Numbered(2))).uuid()
    assert key.uuid() != CacheKey(NSAConfig(), (Numbered(2), Numbered(1))).uuid()
    assert key.uuid() != CacheKey(NSAConfig(window=8), (Numbered(1), Numbered(2))).uuid()


def test_key_takes_the_pass_of_inductors_global_configuration():
    mine = Numbered(7)
    with torch._inductor.config.patch(joint_custom_pre_pass=mine):
        assert with_cache_key({}, NSAConfig())["joint_custom_pre_pass"].passes == (mine,)


@pytest.mark.parametrize("unkeyed", [print, Numbered(None)], ids=["function", "uuid None"])
def test_a_users_pass_without_a_key_turns_caching_off(unkeyed):
    assert CacheKey(NSAConfig(), (Numbered(1), unkeyed)).uuid() is None
