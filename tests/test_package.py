"""The distribution: what a wheel holds, and that it installs and runs in an environment of its own."""

import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import mingru_hf

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources: a build leaves files behind."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "mingru_hf"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(directory), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(directory.glob("*.whl"))


def test_version_is_that_of_the_distribution():
    assert mingru_hf.__version__ == version("mingru-hf")


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mingru_hf").rglob("*.py")}
    assert modules | {"mingru_hf/py.typed"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"mingru_hf", f"mingru_hf-{mingru_hf.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_installs_and_runs_in_an_environment_of_its_own(wheel, tmp_path):
    """Its own site-packages come first; the dependencies, already tested as installed, are lent by this one."""
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True)
    code = """
import mingru_hf, torch, sys
assert mingru_hf.__file__.startswith(sys.argv[1]), mingru_hf.__file__
model = mingru_hf.MinGRUForCausalLM(mingru_hf.MinGRUConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2))
assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=3).shape == (1, 5)
"""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(target)!r})\n{code}", str(target)]
    subprocess.run(command, check=True, cwd=tmp_path)
