"""The structure of the package: imports only point down, and the code saved with a checkpoint is complete."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mingru_hf"
# Files that transformers copies, without folders, next to the weights of a checkpoint; and exporting.py.
TRAVELLING = sorted(path for path in PACKAGE.glob("*.py") if path.name not in ("__init__.py", "conversion.py"))
OPTIONAL = {"numba", "triton", "datasets", "accelerate", "matplotlib", "torchvision", "av", "timm"}

# The modules of the package that each of its files may import, only from lower layers.
ALLOWED = {
    "scan_reference": set(),
    "scan_torch": {"scan_reference"},
    "scan_numba": {"scan_reference"},
    "scan_triton": {"scan_reference"},
    "observers": set(),
    "scan_operator": {"observers", "scan_numba", "scan_reference", "scan_torch", "scan_triton"},
    "scan": {"observers", "scan_numba", "scan_operator", "scan_reference", "scan_torch", "scan_triton"},
    "layers": {"calling", "scan", "scan_reference"},
    "cache_mingru": {"scan_reference"},
    "calling": {"linear", "observers"},
    "configuration_common": set(),
    "continuous_batching": set(),
    "configuration_mingru": {"configuration_common"},
    "exporting": {"modeling_minconvgru"},
    "linear": {"observers", "scan_numba"},
    "loading": set(),
    "losses": {"linear", "observers"},
    "modeling_mingru": {
        "scan",
        "cache_mingru",
        "calling",
        "configuration_mingru",
        "continuous_batching",
        "linear",
        "loading",
        "losses",
        "observers",
    },
    "configuration_minconvgru": {"configuration_common"},
    "modeling_minconvgru": {"scan", "layers", "configuration_minconvgru", "loading", "losses"},
    "video_processing_minconvgru": set(),
}


def imports_of(path):
    """Yield (module, line, inside try, is relative) for each import in a file, except under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in guarded, False
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno, id(node) in guarded, node.level > 0


@pytest.mark.parametrize("path", TRAVELLING, ids=lambda path: path.stem)
def test_travelling_files_import_only_flat_neighbours_below_them(path):
    for module, line, guarded, relative in imports_of(path):
        place = f"{path.name}:{line} imports {module}"
        if relative:
            assert re.fullmatch(r"\.\w+", module), f"{place}: only `from .name import x` is copied by transformers"
            assert module[1:] in ALLOWED[path.stem], f"{place}: imports point down only"
        else:
            assert module.split(".")[0] != "mingru_hf", f"{place}: breaks in a checkpoint without the package"
            assert guarded or module.split(".")[0] not in OPTIONAL, f"{place}: optional packages go inside try:"


@pytest.mark.parametrize("path", TRAVELLING, ids=lambda path: path.stem)
def test_no_text_looks_like_a_relative_import(path):
    """transformers finds imports with a regular expression, line by line, even in docstrings."""
    tree = ast.parse(path.read_text())
    real = {node.lineno: node.end_lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        if re.match(r"\s*(from\s+\.|import\s+\.)", text):
            assert number in real, f"{path.name}:{number} looks like an import"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_the_scripts_and_configurations_import_little(path):
    modules = [module for module, *_ in imports_of(path)]
    assert not any(module.split(".")[0] == "scripts" for module in modules)
    if path.stem.startswith("configuration_"):
        assert {module.split(".")[0] for module in modules} <= {"typing", "huggingface_hub", "transformers", ""}
    if path.parent.name == "data":
        assert not any("training" in module for module in modules)


def test_package_imports_without_any_extra():
    blocked = sorted(OPTIONAL | {"tensorboard", "scipy", "pandas"})
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nimport mingru_hf\nmingru_hf.MinGRU(3, 4)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)
