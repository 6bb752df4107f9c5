"""A saved directory carries its code: it loads without the package, and in the same process as the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_imports import imports_of
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import mingru_hf
from mingru_hf import MinGRUConfig, MinGRUForCausalLM
from mingru_hf.configuration_mingru import AUTO_MAP
from mingru_hf.data.text import build_tokenizer

ROOT = Path(__file__).parent.parent


def files_imported(name, found=()):
    """Return the names of a file and of all files of the package that it imports when it runs."""
    found = {*found, f"{name}.py"}
    for module, _, _, relative in imports_of(ROOT / "mingru_hf" / f"{name}.py"):
        if relative and f"{module[1:]}.py" not in found:
            found |= files_imported(module[1:], found)
    return found


CODE = files_imported("modeling_mingru")
HEADS = [name for name in AUTO_MAP if name != "AutoConfig"]
TEXT = "the quick brown fox jumps over the lazy dog.\n"


def run_python(code, cwd, *args):
    """Run code in a fresh process with warnings as errors, its own module cache, and no input to ask a user."""
    environment = {**os.environ, "HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-P", "-W", "error", "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def tiny_config(**kwargs):
    return MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, initializer_range=0.3, **kwargs)


@pytest.fixture
def directory(tmp_path):
    """Save a language model with its tokenizer."""
    tokenizer = build_tokenizer("char", [TEXT])
    MinGRUForCausalLM(tiny_config(scan_backend="torch")).eval().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", list(AUTO_MAP))
def test_whatever_is_saved_brings_the_code_of_all_heads(name, tmp_path):
    part = getattr(mingru_hf, AUTO_MAP[name].split(".")[1])
    config = tiny_config()
    (config if name == "AutoConfig" else part(config)).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    for reference in AUTO_MAP.values():
        module, cls = reference.split(".")
        assert re.search(rf"^class {cls}\(", (tmp_path / f"{module}.py").read_text(), flags=re.MULTILINE)


def test_a_subclass_travels_only_if_it_asks(tmp_path):
    class Mine(MinGRUForCausalLM):
        pass

    class MyConfig(MinGRUConfig):
        pass

    model = Mine(MyConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert not json.loads((tmp_path / "config.json").read_text())["auto_map"]  # an auto_map would name missing files
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[1, 2]])).logits
        torch.testing.assert_close(MinGRUForCausalLM.from_pretrained(tmp_path)(torch.tensor([[1, 2]])).logits, logits)


def test_a_variant_starts_from_trained_weights(directory):
    class VariantConfig(MinGRUConfig):
        model_type = "variant_of_mingru"

    class Variant(MinGRUForCausalLM):
        config_class = VariantConfig

    variant, model = Variant.from_pretrained(directory), MinGRUForCausalLM.from_pretrained(directory)
    assert type(variant.config) is VariantConfig
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(variant(ids).logits, model(ids).logits)


def test_code_of_another_repository_stays_named(tmp_path):
    config = tiny_config(auto_map={"AutoModel": "someone/code--modeling_mingru.MinGRUModel"})
    config.save_pretrained(tmp_path)
    assert MinGRUConfig.from_pretrained(tmp_path).auto_map["AutoModel"].startswith("someone/code--")
    assert MinGRUConfig.from_pretrained(tmp_path).auto_map["AutoModelForCausalLM"] == AUTO_MAP["AutoModelForCausalLM"]


def test_nothing_asks_for_trust_where_the_package_is_imported(directory, monkeypatch):
    def ask(prompt):
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", ask)
    for auto, cls in ((AutoModel, "MinGRUModel"), (AutoModelForCausalLM, "MinGRUForCausalLM")):
        for trust in ({}, {"trust_remote_code": True}):
            assert type(auto.from_pretrained(directory, **trust)) is getattr(mingru_hf, cls)
    assert AutoTokenizer.from_pretrained(directory).decode(AutoTokenizer.from_pretrained(directory)("fox")[0].ids)


def test_directory_loads_without_the_package_and_saves_whole_again(directory, tmp_path):
    """All heads load without numba and triton, give the same tokens, and are saved with the same code and weights."""
    code = """
import json, sys
for name in ("mingru_hf", "numba", "triton"):
    sys.modules[name] = None
import torch, transformers
from transformers import AutoConfig, AutoTokenizer, pipeline

directory, again = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
inputs = tokenizer(["the quick", "fox"], return_tensors="pt", padding=True)
config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
loaded = {}
for name in HEADS:
    auto = getattr(transformers, name)
    model, report = auto.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    loaded[name] = [type(model).__module__.split(".")[0], sorted(report["missing_keys"])]
    if name == "AutoModelForCausalLM":
        with torch.no_grad():
            logits = model(**inputs).logits.tolist()
        tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False).tolist()
        batch = model.generate_batch(tokenizer(["the quick", "fox"]).input_ids, max_new_tokens=20)
        batch = [result.generated_tokens for result in batch.values()]
        model.save_pretrained(again)
        tokenizer.save_pretrained(again)
        model.model.save_pretrained(again + "_base")
text = pipeline("text-generation", again, trust_remote_code=True, do_sample=False)("fox", max_new_tokens=20)
written = {"tokens": tokens, "batch": batch, "text": text[0]["generated_text"]}
print(json.dumps({"loaded": loaded, "logits": logits, **written}))
""".replace("HEADS", repr(HEADS))
    again = tmp_path / "again"
    result = run_python(code, tmp_path, directory, again)

    for module, missing in result["loaded"].values():
        assert module == "transformers_modules"
        assert all(key.startswith("score.") for key in missing), missing  # these weights are new in any case
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    inputs = tokenizer(["the quick", "fox"], return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(result["logits"]), model(**inputs).logits)
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert result["tokens"] == tokens.tolist()
    batch = model.generate_batch(tokenizer(["the quick", "fox"]).input_ids, max_new_tokens=20)
    assert result["batch"] == [result.generated_tokens for result in batch.values()]
    one = model.generate(**tokenizer("fox", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert result["text"] == tokenizer.decode(one[0], skip_special_tokens=True)

    names = {path.name for path in directory.iterdir()}
    assert names == {path.name for path in again.iterdir()}
    for name in names - {"tokenizer.json", "tokenizer_config.json"}:
        assert (directory / name).read_bytes() == (again / name).read_bytes(), name
    assert {path.name for path in Path(f"{again}_base").glob("*.py")} == CODE


BOTH = """
import json, sys
import torch
from transformers import DynamicCache

directory, root, package_first = sys.argv[1], sys.argv[2], sys.argv[3] == "package"
sys.path.insert(0, root)

def load_package():
    import mingru_hf
    return mingru_hf.MinGRUForCausalLM.from_pretrained(directory)

def load_remote():
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    if not package_first:
        return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    cls = get_class_from_dynamic_module("modeling_mingru.MinGRUForCausalLM", directory)
    return cls.from_pretrained(directory)

models = [load_package(), load_remote()] if package_first else [load_remote(), load_package()]
modules = {type(model).__module__.split(".")[0] for model in models}
prompt = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4]])
outputs = {}
for way, options in {
    "uncached": {"use_cache": False},
    "cached": {},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
}.items():
    outputs[way] = [model.generate(prompt, max_new_tokens=15, do_sample=False, **options).tolist() for model in models]
caches = [DynamicCache(config=model.config) for model in models]
steps = [[], []]
with torch.no_grad():
    for t in range(prompt.shape[1]):  # turn about, so that neither finds the other's state
        for model, cache, logits in zip(models, caches, steps):
            logits.append(model(prompt[:, t : t + 1], cache=cache).logits)
    whole = models[0](prompt).logits
off = max((torch.cat(logits, 1) - whole).abs().max().item() for logits in steps)
print(json.dumps({"modules": sorted(modules), "outputs": outputs, "off": off}))
"""


@pytest.mark.parametrize("first", ["package", "remote"])
def test_package_and_remote_copy_live_in_one_process(first, directory, tmp_path):
    result = run_python(BOTH, tmp_path, directory, ROOT, first)
    assert result["modules"] == ["mingru_hf", "transformers_modules"]
    for way, (one, other) in result["outputs"].items():
        assert one == other, way
        assert way == "beams" or one == result["outputs"]["uncached"][0], way
    assert result["off"] < 1e-5


VERSIONS = """
import json, sys
sys.modules["mingru_hf"] = None
import torch
from transformers import AutoModelForCausalLM, DynamicCache

prompt = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4]])
ways = [{}, {"cache_implementation": "static", "disable_compile": True}, {"prompt_lookup_num_tokens": 3}]

def tokens(model):
    return [model.generate(prompt, max_new_tokens=9, do_sample=False, **way).tolist() for way in ways]

one = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
results = [tokens(one)]
other = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
results += [tokens(other), tokens(one)]
cache = DynamicCache(config=one.config)
with torch.no_grad():
    one(prompt, cache=cache)
    try:
        other(prompt, cache=cache)
    except ValueError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def test_checkpoints_with_code_of_two_versions_live_in_one_process(directory, tmp_path):
    """Both versions share transformers' table of cache layers: the one loaded last must not break the other."""
    later = tmp_path / "later"
    shutil.copytree(directory, later)
    for name in ("cache_mingru.py", "modeling_mingru.py"):
        code = (later / name).read_text()
        assert "num_to_record" in code
        (later / name).write_text(code.replace("num_to_record", "states_to_record"))
    before, other, after, error = run_python(VERSIONS, tmp_path, directory, later)
    assert before == other == after
    assert "another copy" in error
