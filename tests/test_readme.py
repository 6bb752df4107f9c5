"""Snippets of README and docs/ run as printed, commands are understood by the scripts, and links lead somewhere."""

import importlib
import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from transformers import ResNetConfig
from transformers.utils import logging

import mingru_hf
from mingru_hf import (
    MinConvGRUConfig,
    MinConvGRUForVideoClassification,
    MinConvGRUVideoProcessor,
    MinGRUConfig,
    MinGRUForCausalLM,
)
from mingru_hf.data.moving_shapes import make_moving_shape, write_video
from mingru_hf.data.text import build_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "".join(document.read_text() for document in DOCUMENTS)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
SNIPPETS = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("python ")
]


@pytest.fixture
def demo_directory(tmp_path, monkeypatch):
    """A working directory in which `make demo` might have run: a tiny model in runs/demo."""
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)  # remove the state of another snippet's training
    tokenizer = build_tokenizer("char", ["ROMEO:\n\nJULIET:\nabcdefghijklmnopqrstuvwxyz ,.'!"])
    config = MinGRUConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, pad_token_id=0)
    MinGRUForCausalLM(config).save_pretrained("runs/demo")
    tokenizer.save_pretrained("runs/demo")


@pytest.fixture
def shapes_directory(demo_directory):
    """Add a tiny model in runs/shapes, as training on videos would leave it, and a clip."""
    pytest.importorskip("av", reason="videos are read and written by PyAV")
    pytest.importorskip("torchvision", reason="transformers' video processors are built on torchvision")
    backbone = ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", out_features=["stage1"]
    )
    config = MinConvGRUConfig(backbone_config=backbone, num_labels=3, num_frames=4)
    MinConvGRUForVideoClassification(config).save_pretrained("runs/shapes")
    MinConvGRUVideoProcessor(num_frames=4, size={"shortest_edge": 32}, crop_size=32).save_pretrained("runs/shapes")
    write_video("clip.mp4", make_moving_shape(0, num_frames=6, size=32))


@pytest.mark.filterwarnings("ignore:.pin_memory. argument:UserWarning")  # from Trainer, where there is no GPU
@pytest.mark.parametrize("index", range(len(SNIPPETS)))
@pytest.mark.usefixtures("demo_directory")
def test_snippets_run_as_printed(index, request):
    if "runs/shapes" in SNIPPETS[index]:
        request.getfixturevalue("shapes_directory")
    exec(compile(SNIPPETS[index], f"snippet {index}", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60])
def test_commands_are_understood(command, monkeypatch):
    """The script itself parses each command; files that only a user has need not exist."""
    _, script, *arguments = shlex.split(command)
    parse_args = runpy.run_path(str(ROOT / script))["parse_args"]
    parse_args(arguments)


def test_files_that_are_named_exist():
    tree = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"^  (\w+\.py) ", tree, flags=re.MULTILINE):
        assert (ROOT / "mingru_hf" / name).is_file(), name
    for path in (ROOT / "mingru_hf").glob("[a-z]*.py"):
        assert f"\n  {path.name} " in tree, path.name
    for name in re.findall(r"`(\w+\.json)`", TEXT):
        found = (ROOT / "scripts" / "configs" / name).is_file()
        assert found or name == "metrics.json", name


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        file, _, heading = target.partition("#")
        if "://" in target:
            continue
        path = (document.parent / file) if file else document
        assert path.is_file(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_snippets_say_nothing_they_should_not(demo_directory, caplog, capfd):
    logging.set_verbosity_warning()
    for snippet in SNIPPETS[:2]:
        exec(compile(snippet, "README", "exec"), {})
    assert "warning" not in capfd.readouterr().err.lower()


def test_api_table_has_every_public_name_where_it_is():
    table = README[README.index("## API") : README.index("## Limits")]
    links = dict(re.findall(r"\[`(\w+)`\]\(([\w/.]+)\)", table))
    assert set(mingru_hf.__all__) <= set(links)
    for name, file in links.items():
        assert re.search(rf"^(class|def) {name}\b", (ROOT / file).read_text(), flags=re.MULTILINE), name
        assert inspect.getdoc(getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name))
