"""Sharing through a Hub: what is pushed loads again in full, with the package and without it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard
from transformers import AutoTokenizer, ResNetConfig

from mingru_hf import (
    MinConvGRUConfig,
    MinConvGRUForVideoClassification,
    MinConvGRUVideoProcessor,
    MinGRUConfig,
    MinGRUForCausalLM,
)
from mingru_hf.data.text import build_tokenizer
from mingru_hf.training.hub import files_to_upload, make_repository, push_directory

ROOT = Path(__file__).parent.parent
TEXT = "the quick brown fox jumps over the lazy dog.\n"
PROMPT = "the fox"
CARD = "---\nlibrary_name: transformers\ntags:\n- mingru\n---\n# A fox\n"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub, monkeypatch, tmp_path):
    """Log this process in to the test Hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def reader(hub, tmp_path):
    """Return a function that runs code in a fresh process with access to this Hub only.

    The function returns the last line that the code prints, parsed as JSON.
    """

    def run(code, *words):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def directory(tmp_path):
    """Write a directory as a training script leaves it: model, tokenizer, card, logs, a checkpoint to resume from."""
    path = tmp_path / "fox"
    tokenizer = build_tokenizer("char", [TEXT])
    config = MinGRUConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, initializer_range=0.3)
    MinGRUForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "README.md").write_text(CARD)
    (path / "metrics.json").write_text("{}")
    (path / "runs").mkdir()
    (path / "runs" / "events").write_bytes(b"curve")
    (path / "checkpoint-10").mkdir()
    (path / "checkpoint-10" / "training_state.pt").write_bytes(b"optimizer")
    (path / ".incomplete").write_text("")
    return path


def generated(directory):
    tokenizer = build_tokenizer("char", [TEXT])
    model = MinGRUForCausalLM.from_pretrained(directory)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()


def push(*words):
    spec = importlib.util.spec_from_file_location("push_to_hub", ROOT / "scripts" / "push_to_hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(word) for word in words])


GENERATE = """
import json, sys
package, name, *revisions = sys.argv[1:]
if package == "with the package":
    import mingru_hf
else:
    sys.modules["mingru_hf"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer

trust = {} if package == "with the package" else {"trust_remote_code": True}
result = {}
for revision in revisions:
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **trust)
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision, **trust)
    ids = tokenizer("the fox", return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    result[revision] = [type(model).__module__.split(".")[0], tokens]
print(json.dumps(result))
"""


@pytest.mark.usefixtures("client")
def test_directory_pushed_by_the_script_comes_back(hub, reader, directory, capsys):
    """The upload is private and lacks only what a resumed run needs; it loads with and without the package."""
    push("--model_dir", directory, "--hub_model_id", "user/fox")
    assert f"{hub.endpoint}/user/fox" in capsys.readouterr().out
    local = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    expected = local - {"checkpoint-10/training_state.pt", ".incomplete"}
    files = hub.files("user/fox")
    assert files.keys() - {".gitattributes"} == expected
    assert all(files[name] == (directory / name).read_bytes() for name in expected)
    assert hub.repositories["model", "user/fox"]["private"]

    card = "---\ntags:\n- generated-by-mingru-hf\n---\n\n# fox\n\n{}\n"
    loading = 'AutoModelForCausalLM.from_pretrained("{}")\npipeline("text-generation", model="{}")'
    (directory / "README.md").write_text(card.format(loading.format("runs/fox", "runs/fox")))
    push("--model_dir", directory, "--hub_model_id", "fox")
    assert hub.files("user/fox")["README.md"].decode() == card.format(loading.format("user/fox", "user/fox"))

    tokens = generated(directory)
    assert reader(GENERATE, "with the package", "user/fox", "main") == {"main": ["mingru_hf", tokens]}
    assert reader(GENERATE, "without", "user/fox", "main") == {"main": ["transformers_modules", tokens]}


@pytest.mark.usefixtures("client")
def test_push_to_hub_of_model_tokenizer_and_card_and_a_pinned_revision(hub, reader, directory):
    model = MinGRUForCausalLM.from_pretrained(directory)
    model.push_to_hub("fox", tags=["char"])
    AutoTokenizer.from_pretrained(directory).push_to_hub("fox")
    card = ModelCard.load("user/fox")
    card.text = "A fox."
    HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="user/fox")
    HfApi().create_tag("user/fox", tag="v1")
    torch.nn.init.zeros_(model.lm_head.weight)
    model.push_to_hub("fox", commit_message="worse")

    assert b"A fox." in hub.files("user/fox")["README.md"]
    assert b"- char" in hub.files("user/fox")["README.md"]
    assert (
        hub.files("user/fox", "v1").keys() == hub.files("user/fox").keys() > {"modeling_mingru.py", "tokenizer.json"}
    )
    result = reader(GENERATE, "without", "user/fox", "v1", "main")
    assert result["v1"][1] == generated(directory) != result["main"][1]


@pytest.mark.usefixtures("client")
def test_video_model_and_processor_come_back_without_the_package(hub, reader, tmp_path):
    for package in ("av", "torchvision"):
        pytest.importorskip(package, reason="the video-classification pipeline needs PyAV and torchvision")
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    backbone = ResNetConfig(**sizes, out_features=["stage1"])
    config = MinConvGRUConfig(backbone_config=backbone, num_labels=2, num_frames=4, initializer_range=0.5)
    model = MinConvGRUForVideoClassification(config).eval()
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = MinConvGRUVideoProcessor(num_frames=4, **size)
    model.push_to_hub("clips")
    processor.push_to_hub("clips")
    code = """
import json, sys
sys.modules["mingru_hf"] = None
import numpy as np
from transformers import pipeline

classify = pipeline("video-classification", model="user/clips", trust_remote_code=True, device="cpu")
answers = classify(np.arange(9 * 40 * 48 * 3).reshape(9, 40, 48, 3).astype(np.uint8))
modules = [type(part).__module__.split(".")[0] for part in (classify.model, classify.video_processor)]
print(json.dumps([modules, sorted((answer["label"], answer["score"]) for answer in answers)]))
"""
    modules, answers = reader(code)
    assert modules == ["transformers_modules", "transformers_modules"]
    frames = np.arange(9 * 40 * 48 * 3).reshape(9, 40, 48, 3).astype(np.uint8)
    with torch.no_grad():
        scores = model(**processor(frames, return_tensors="pt")).logits[0].softmax(-1).tolist()
    assert [score for _, score in answers] == pytest.approx(scores, abs=1e-5)


@pytest.mark.usefixtures("client")
def test_an_interrupted_upload_leaves_nothing_and_succeeds_when_repeated(hub, directory, monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.broken_commits = 100  # more than the client retries
    with pytest.raises(SystemExit):
        push("--model_dir", directory, "--public")
    assert "repeat it" in capsys.readouterr().err
    assert hub.broken_commits < 100
    assert hub.files("user/fox") == {}
    hub.broken_commits = 0
    push("--model_dir", directory, "--public")
    assert hub.files("user/fox")["model.safetensors"] == (directory / "model.safetensors").read_bytes()
    assert not hub.repositories["model", "user/fox"]["private"]


@pytest.mark.usefixtures("client")
def test_a_new_repository_is_private_unless_asked_otherwise(hub, directory):
    assert make_repository("fox") == "user/fox"
    assert make_repository("user/open", private=False) == make_repository("open") == "user/open"
    assert push_directory(directory, "cub") == f"{hub.endpoint}/user/cub"
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"it lacks config\.json"):
        push_directory(directory, "half")  # no repository is created for it
    private = {name: repository["private"] for (_, name), repository in hub.repositories.items()}
    assert private == {"user/fox": True, "user/open": False, "user/cub": True}


def test_a_dataset_of_the_hub_loads(hub, reader):
    files = {"train.txt": TEXT.encode() * 3, "README.md": b"---\nlanguage: en\n---\n"}
    repository = {"private": False, "refs": {"main": "a" * 40}, "commits": {"a" * 40: files}}
    hub.repositories["dataset", "user/foxes"] = repository
    code = """
import json
from mingru_hf.data.text import load_text_datasets
datasets = load_text_datasets(dataset_name="user/foxes", validation_split_percentage=34)
print(json.dumps({split: "".join(datasets[split]["text"]).count("fox") for split in datasets}))
"""
    assert sum(reader(code).values()) == 3


def test_of_a_checkpoint_the_model_alone_is_uploaded(directory):
    whole = files_to_upload(directory)
    (directory / "best").mkdir()
    (directory / "best" / "model.safetensors").write_bytes(b"of another step")
    (directory / "training_state.pt").write_bytes(b"optimizer")
    (directory / "trainer_state.json").write_text("{}")
    assert files_to_upload(directory) == whole


def test_without_a_login_nothing_happens(hub, client, directory, monkeypatch, capsys):
    push("--model_dir", directory, "--dry_run")
    listed = capsys.readouterr().out
    assert "model.safetensors\n" in listed
    assert "checkpoint-10" not in listed
    with pytest.raises(SystemExit):
        push("--model_dir", directory, "--hub_model_id", "me/x y/z", "--dry_run")
    assert "me/x y/z" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SystemExit):
        push("--model_dir", directory)
    error = capsys.readouterr().err
    assert "the Hub could not create the repository fox: " in error
    assert "401" in error
    monkeypatch.setattr("mingru_hf.training.hub.get_token", lambda: None)
    with pytest.raises(SystemExit):
        push("--model_dir", directory)
    assert "hf auth login" in capsys.readouterr().err
    assert not hub.repositories


def test_what_is_no_whole_model_is_refused(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        files_to_upload(tmp_path / "nothing")
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        files_to_upload(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"it lacks model\.safetensors"):
        files_to_upload(directory)

    config = MinGRUConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2)
    MinGRUForCausalLM(config).save_pretrained(directory, max_shard_size="100KB")
    shards = sorted(path.name for path in directory.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert set(shards) < set(files_to_upload(directory))
    content = (directory / shards[-1]).read_bytes()
    (directory / shards[-1]).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{shards[-1]} is damaged"):
        files_to_upload(directory)
    (directory / shards[-1]).write_bytes(content)
    (directory / shards[0]).unlink()
    with pytest.raises(FileNotFoundError, match=f"does not contain a complete model: it lacks {shards[0]}"):
        files_to_upload(directory)
    (directory / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"does not contain a complete model: it lacks config\.json, {shards[0]}"
    ):
        files_to_upload(directory)


def test_whole_weights_count_before_an_index_that_was_there_first(directory):
    """`from_pretrained` also prefers the file of whole weights to an index."""
    (directory / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    assert "model.safetensors" in files_to_upload(directory)


def test_files_below_the_directory_are_uploaded_but_hidden_ones_and_caches(directory):
    whole = files_to_upload(directory)
    assert "runs/events" in whole
    assert whole == sorted(whole)
    for name in ("runs/.DS_Store", "__pycache__/modeling_mingru.cpython-311.pyc", ".cache/a"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).touch()
    assert files_to_upload(directory) == whole
