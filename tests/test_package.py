"""The distributions: their contents, and that the wheel installs and runs in its own environment."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import mingru_hf

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Build source distribution and wheel in a copy, since a build leaves files behind, and return their folder."""
    directory = tmp_path_factory.mktemp("distributions")
    source = directory / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in ("mingru_hf", "tests", "scripts", "model_cards", "assets"):
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, source)
    command = [sys.executable, "-m", "build", "--outdir", str(directory), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return directory


@pytest.fixture(scope="module")
def wheel(distributions):
    return next(distributions.glob("*.whl"))


def test_source_distribution_holds_what_its_tests_read(distributions):
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("mingru_hf", "tests", "scripts", "model_cards", "assets"):
        files = {path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        assert {str(path.relative_to(ROOT)) for path in files} <= names
    assert {"LOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"} <= names
    assert not any("__pycache__" in name for name in names)


def test_version_is_that_of_the_distribution():
    assert mingru_hf.__version__ == version("mingru-hf")


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mingru_hf").rglob("*.py")}
    assert modules | {"mingru_hf/py.typed"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"mingru_hf", f"mingru_hf-{mingru_hf.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_installs_and_runs_in_an_environment_of_its_own(wheel, tmp_path):
    """The wheel comes first on the path; the dependencies are those of the current environment, tested elsewhere."""
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
