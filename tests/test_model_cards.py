"""The cards in model_cards/ are valid on the Hub, quote LOG.md, and give commands that the scripts understand."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers.pipelines import PIPELINE_REGISTRY

ROOT = Path(__file__).parent.parent
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
LOG = (ROOT / "LOG.md").read_text()


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_metadata_is_valid(path):
    data = ModelCard.load(path).data  # parses the YAML and, if present, the model-index
    assert data.library_name == "transformers"
    assert data.license == "apache-2.0"
    assert data.tags
    assert all(isinstance(tag, str) for tag in data.tags)
    assert data.pipeline_tag is None or data.pipeline_tag in PIPELINE_REGISTRY.get_supported_tasks()
    assert data.language is None or re.fullmatch("[a-z]{2}", data.language)
    known = {"library_name", "license", "tags", "pipeline_tag", "language", "datasets", "metrics", "model-index"}
    assert set(data.to_dict()) <= known | {"model_name", "base_model"}


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_card_says_what_a_reader_needs_and_quotes_the_log(path):
    text = ModelCard.load(path).text
    for heading in ("# ", "## Load it", "## Data", "## Results", "## Limits"):
        assert re.search(rf"^{heading}", text, flags=re.MULTILINE), heading
    assert "trust_remote_code" in text
    results = text[text.index("## Results") :]
    results = results[: results.index("\n## ")]
    numbers = [n for n in re.findall(r"\d[\d,.]*\d", results) if len(re.sub(r"\D", "", n)) >= 3]
    assert numbers or "not been" in results  # either measured, or described as not measured
    for number in numbers:  # of at least three digits; a part of a longer number in LOG.md does not count
        found = re.search(rf"(?<![\d,.]){re.escape(number)}(?!\d|[,.]\d)", LOG)
        assert found, f"{path.name} quotes {number}, which LOG.md does not have"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_commands_are_understood_and_snippets_compile(path):
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL):
        if language == "python":
            compile(block, path.name, "exec")
        for line in block.replace("\\\n", " ").splitlines() if language == "bash" else ():
            if line.startswith("python "):
                _, script, *arguments = shlex.split(line)
                runpy.run_path(str(ROOT / script))["parse_args"](arguments)
