"""What a user installs: the wheel, the source archive, the editable install, and no installation at all.

Everything is built from a copy of the repository, and run by interpreters that read no `.pth` file, so that an
installation in the environment of the tests does not stand in for the one under test.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv", ".ci-venv", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)
INSTALLED = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
PROBE = """
    import nsa_compile, nsa_compile.passes.find, nsa_compile.kernels.reference, nsa_compile.kernels.operators
    import torch
    query, key, value = torch.randn(1, 4, 70, 8), torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70, 8)
    assert nsa_compile.nsa_attention(query, key, value).shape == query.shape
    print(nsa_compile.__file__)
"""


def run(*arguments: str, cwd: Path, path: list[Path] | None = None) -> str:
    """Runs Python without `.pth` files, with `path` before the installed packages; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path or []), *INSTALLED])}
    done = subprocess.run(
        [sys.executable, "-S", *arguments], cwd=cwd, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(hook: str, source: Path, target: Path) -> Path:
    """Calls a build hook, as pip does, and returns the file that it makes."""
    target.mkdir()
    call = f"import setuptools.build_meta as backend; backend.{hook}({str(target)!r})"
    run("-c", call, cwd=source)
    (made,) = target.iterdir()
    return made


def install(wheel: Path, target: Path) -> Path:
    """Unpacks a pure wheel the way an installer does."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "repo", symlinks=True, ignore=NOT_SOURCES))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", source, tmp_path_factory.mktemp("wheel") / "dist")


def modules_of(folder: str) -> set[str]:
    """Returns the sources under a top-level folder, by their path in the package."""
    inside = "" if folder == "nsa_compile" else "nsa_compile/"
    return {
        inside + path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".md", ".json", ".jinja"} or path.name == "py.typed"
    }


@pytest.mark.parametrize("folder", ["nsa_compile", "passes", "kernels"])
def test_wheel_holds_every_source(wheel: Path, folder: str) -> None:
    expected = modules_of(folder)
    assert expected
    assert expected - files(wheel) == set()


def test_wheel_holds_the_gpu_kernels(wheel: Path) -> None:
    assert any(name.startswith("nsa_compile/kernels/gpu/") for name in files(wheel))


def test_wheel_installs_one_top_level_package(wheel: Path) -> None:
    top = {name.split("/")[0] for name in files(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"nsa_compile"}


def test_wheel_carries_the_licence(wheel: Path) -> None:
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in files(wheel))


def test_source_archive_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    archive = build("build_sdist", source, tmp_path / "sdist")
    with tarfile.open(archive) as opened:
        top = {name.split("/")[1] for name in opened.getnames() if "/" in name}
        # Python before 3.10.12 and 3.11.4 knows no filter.
        safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        opened.extractall(tmp_path / "unpacked", **safely)
    assert top.isdisjoint({"passes", "kernels"})
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert files(build("build_wheel", unpacked, tmp_path / "dist")) == files(wheel)


def test_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    target = install(wheel, tmp_path / "target")
    backend = """
        import importlib.metadata, torch._dynamo
        names = [entry.name for entry in importlib.metadata.entry_points(group="torch_dynamo_backends")]
        assert names.count("nsa") == 1, names
        assert "nsa" in torch._dynamo.list_backends()
        assert torch._dynamo.lookup_backend("nsa") is nsa_compile.nsa_backend
    """
    printed = run("-c", textwrap.dedent(PROBE) + textwrap.dedent(backend), cwd=tmp_path, path=[target])
    assert Path(printed.strip()) == target / "nsa_compile" / "__init__.py"


def test_editable_install_runs_the_checkout(source: Path, tmp_path: Path) -> None:
    target = install(build("build_editable", source, tmp_path / "dist"), tmp_path / "target")
    # First on the path: the environment may hold an editable install of its own, as CI's does, of the same name.
    script = f"import site, sys; sys.path.insert(0, {str(target)!r}); site.addsitedir({str(target)!r})\n"
    script += textwrap.dedent(PROBE)
    assert Path(run("-c", script, cwd=tmp_path).strip()) == source / "nsa_compile" / "__init__.py"


def test_root_on_the_path_is_enough(source: Path, tmp_path: Path) -> None:
    printed = run("-c", textwrap.dedent(PROBE), cwd=tmp_path, path=[source])
    assert Path(printed.strip()) == source / "nsa_compile" / "__init__.py"


def test_pytest_at_the_root_needs_no_installation(source: Path) -> None:
    (source / "tests" / "test_probe.py").write_text(
        "import nsa_compile.kernels.reference, nsa_compile.passes.find\n\n\n"
        "def test_probe():\n"
        f"    assert nsa_compile.passes.find.__file__.startswith({str(source)!r})\n"
    )
    printed = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_probe.py", cwd=source)
    assert "1 passed" in printed


def test_other_packages_named_kernels_and_passes_are_not_shadowed(source: Path, tmp_path: Path) -> None:
    # The kernels package of Hugging Face is a regular package; it may come later on the path than the root here.
    for name in ("kernels", "passes"):
        (tmp_path / "other" / name).mkdir(parents=True)
        (tmp_path / "other" / name / "__init__.py").write_text("OTHER = True\n")
    wheel_path = install(build("build_wheel", source, tmp_path / "dist"), tmp_path / "target")
    installed = textwrap.dedent(PROBE) + "import kernels, passes; assert kernels.OTHER and passes.OTHER\n"
    run("-c", installed, cwd=tmp_path, path=[wheel_path, tmp_path / "other"])
    uninstalled = textwrap.dedent(PROBE) + "import kernels; assert kernels.OTHER\n"
    run("-c", uninstalled, cwd=tmp_path, path=[source, tmp_path / "other"])


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_transformers_works_beside_the_root(source: Path, tmp_path: Path) -> None:
    script = """
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1)
        assert LlamaForCausalLM(config)(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 32)
    """
    run("-c", textwrap.dedent(PROBE) + textwrap.dedent(script), cwd=source, path=[source])


def test_links_are_relative() -> None:
    for name in ("passes", "kernels"):
        link = ROOT / "nsa_compile" / name
        assert link.readlink() == Path("..") / name


def test_kernels_is_a_namespace_package() -> None:
    # A regular package of that name at the root would shadow Hugging Face's.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_extras_and_dependency_groups_agree() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras, groups = settings["project"]["optional-dependencies"], settings["dependency-groups"]
    assert groups["test"] == extras["test"]
    assert [each for each in groups["dev"] if isinstance(each, str)] == extras["dev"][1:]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = "python -m pytest"
    assert f"\n{command}\n" in (ROOT / "README.md").read_text()
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
