"""The libraries around transformers run MinGRU models; `make test-clients` prints a table of them.

Trainers are tested in test_trainers.py, the video pipeline in test_video_processing_minconvgru.py.

Not supported: GGUF (llama.cpp) and vLLM, which have their own model code and none for MinGRU.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    ResNetConfig,
    pipeline,
)

from mingru_hf import (
    MinConvGRUConfig,
    MinConvGRUForVideoClassification,
    MinGRUConfig,
    MinGRUForCausalLM,
    MinGRUForSequenceClassification,
    MinGRUForTokenClassification,
    MinGRUModel,
)
from mingru_hf.data.text import build_tokenizer

ROOT = Path(__file__).parent.parent
TEXT = "the quick brown fox jumps over the lazy dog.\n"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# PEFT and TRL use names that transformers has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("char", [TEXT])


def config_for(tokenizer, **options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
    return MinGRUConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **options)


@pytest.fixture
def model(tokenizer):
    return MinGRUForCausalLM(config_for(tokenizer)).eval()


@pytest.fixture
def directory(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def inputs(tokenizer):
    return tokenizer(["the quick brown", "fox"], return_tensors="pt", padding=True)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def greedy(model, inputs, num_tokens=12):
    return model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)


# --- Pipelines


@pytest.mark.clients("transformers")
def test_pipeline_text_generation(directory, model, tokenizer):
    texts = pipeline("text-generation", str(directory), do_sample=False)(["the fox", "dog"], max_new_tokens=8)
    for prompt, text in zip(["the fox", "dog"], texts, strict=True):
        expected = greedy(model, tokenizer(prompt, return_tensors="pt"), 8)
        assert text[0]["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


@pytest.mark.clients("transformers")
def test_pipeline_text_classification(tokenizer):
    model = MinGRUForSequenceClassification(config_for(tokenizer, id2label={0: "sly", 1: "lazy"})).eval()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    texts = ["the quick brown fox", "dog"]
    single = [classify(text)[0] for text in texts]
    for one, batched in zip(single, classify(texts, batch_size=2), strict=True):
        assert one["label"] == batched["label"]
        assert one["score"] == pytest.approx(batched["score"], abs=1e-5)
    logits = model(**tokenizer("dog", return_tensors="pt")).logits[0]
    assert single[1]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)


@pytest.mark.clients("transformers")
def test_pipeline_token_classification(tokenizer):
    model = MinGRUForTokenClassification(config_for(tokenizer, num_labels=3)).eval()
    entities = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])("the fox")
    logits = model(**tokenizer("the fox", return_tensors="pt")).logits[0]
    assert [int(entity["entity"].removeprefix("LABEL_")) for entity in entities] == logits.argmax(-1).tolist()


@pytest.mark.clients("transformers")
def test_pipeline_feature_extraction(tokenizer):
    model = MinGRUModel(config_for(tokenizer)).eval()
    features = pipeline("feature-extraction", model=model, tokenizer=tokenizer)("the fox")
    with torch.no_grad():
        expected = model(**tokenizer("the fox", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(torch.tensor(features), expected, **CLOSE)


# --- Training


@pytest.mark.clients("peft")
@pytest.mark.parametrize("targets", [["gate_hidden", "out_proj"], "all-linear"])
def test_peft_lora_reaches_the_recurrence_and_merges(model, inputs, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA comes from peft")
    with torch.no_grad():
        base = model(**inputs).logits
    lora = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    for target in ("gate_hidden", "out_proj"):
        assert sum(f".mixer.{target}.lora_" in name for name in names) == 4  # A and B in each of two blocks
    adapted(**inputs, labels=inputs.input_ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    with torch.no_grad():
        expected = adapted(**inputs).logits
        assert (expected - base).abs().max() > 0.01
        tokens = greedy(adapted, inputs)

        adapted.save_pretrained(tmp_path)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, **CLOSE)
        torch.testing.assert_close(greedy(merged, inputs), tokens)
    assert not list(tmp_path.glob("*.py"))  # a directory with an adapter needs no code


@pytest.mark.clients("peft")
def test_peft_adapts_the_weight_of_the_convolution(model, inputs):
    peft = pytest.importorskip("peft", reason="LoRA comes from peft")
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=["conv.conv.weight"], init_lora_weights=False)
    with torch.no_grad():
        base = model(**inputs).logits
        adapted = peft.get_peft_model(model, lora)
        logits = adapted(**inputs).logits
        assert (logits - base).abs().max() > 0.01
        cache = adapted(inputs.input_ids[:1, :3], use_cache=True).cache
        last = adapted(inputs.input_ids[:1, 3:], cache=cache).logits[:, -1]
    torch.testing.assert_close(last, adapted(inputs.input_ids[:1]).logits[:, -1], **CLOSE)


@pytest.mark.clients("trl")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_trl_packed_training_sees_the_borders_of_the_documents(model, tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="SFTTrainer comes from trl")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        packing=True,
        packing_strategy="bfd",
        padding_free=True,
        max_length=64,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"text": text} for text in (TEXT, "the fox.\n", "dog\n", "lazy dog.\n")] * 4)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"] == 0).sum().item()
    assert starts > len(batch["input_ids"])  # some rows hold several documents
    with torch.no_grad():
        packed = trainer.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        begins = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        for first, last in zip(begins, [*begins[1:], None], strict=True):
            alone = trainer.model(input_ids=batch["input_ids"][:1, first:last]).logits[0]
            torch.testing.assert_close(packed[first:last], alone, **CLOSE)
    losses = [entry["loss"] for entry in trainer.train() and trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.clients("trl")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batched", [False, True], ids=["generate", "continuous batching"])
def test_trl_rewards_are_learned(model, tokenizer, tmp_path, batched):
    trl = pytest.importorskip("trl", reason="GRPOTrainer comes from trl")
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=16,
        learning_rate=3e-2,
        logging_steps=1,
        use_transformers_continuous_batching=batched,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **kwargs: [text.count("e") / 16 for text in completions],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in ("the ", "fox ", "dog ")] * 8),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[0] < 0.5 < rewards[-1]


# --- Placement and precision


@pytest.mark.clients("accelerate")
@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"device_map": {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "disk", "lm_head": "cpu"}},
    ],
    ids=["auto", "cpu", "low memory", "disk"],
)
def test_accelerate_places_and_offloads(directory, model, inputs, options, tmp_path):
    placed = AutoModelForCausalLM.from_pretrained(directory, offload_folder=tmp_path / "offload", **options)
    with torch.no_grad():
        torch.testing.assert_close(placed(**inputs).logits, model(**inputs).logits, **CLOSE)
        torch.testing.assert_close(greedy(placed, inputs), greedy(model, inputs))


@pytest.mark.clients("accelerate")
def test_accelerate_offloads_to_the_cpu(model, inputs):
    from accelerate import cpu_offload

    with torch.no_grad():
        expected, tokens = model(**inputs).logits, greedy(model, inputs)
        cpu_offload(model, execution_device="cpu")
        assert all(parameter.device.type == "meta" for parameter in model.parameters())
        torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
        torch.testing.assert_close(greedy(model, inputs), tokens)


@pytest.mark.clients("torchao")
@pytest.mark.filterwarnings("ignore")
def test_torchao_int8_weights_stay_close(directory, model, inputs):
    """Rounding the weights to 8 bits changes no next-token probability by 0.02 or more."""
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights come from torchao")
    from transformers import TorchAoConfig

    int8 = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    small = AutoModelForCausalLM.from_pretrained(directory, quantization_config=int8)
    assert type(small.model.layers[0].mixer.gate_hidden.weight) is not torch.nn.Parameter
    with torch.no_grad():
        probabilities, expected = small(**inputs).logits.softmax(-1), model(**inputs).logits.softmax(-1)
    difference = (probabilities - expected).abs().max()
    assert 0 < difference < 0.02
    assert greedy(small, inputs).shape == greedy(model, inputs).shape


# --- Type checkers


@pytest.mark.clients("mypy")
def test_a_type_checker_knows_what_the_user_gets(tmp_path, monkeypatch):
    mypy = pytest.importorskip("mypy.api", reason="the types are read by mypy")
    source = tmp_path / "user.py"
    source.write_text(
        "import torch\n"
        "from mingru_hf import MinConvGRUForVideoClassification, MinGRUConfig, MinGRUForCausalLM, mingru_scan\n"
        "model = MinGRUForCausalLM(MinGRUConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1))\n"
        "reveal_type(model.config)\n"
        'reveal_type(MinConvGRUForVideoClassification.from_pretrained("runs/moving"))\n'
        "reveal_type(mingru_scan(torch.ones(1, 2, 2)))\n"
        "reveal_type(mingru_scan(torch.ones(1, 2, 2), return_last_state=True))\n"
        "def either(flag: bool) -> None:\n"
        "    mingru_scan(torch.ones(1, 2, 2), return_last_state=flag)\n"
    )
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    options = ["--ignore-missing-imports", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    report, _, _ = mypy.run([str(source), *options])
    types = re.findall(r'Revealed type is "(?:.*?)(\w+(?:\[.*\])?)"', report)
    tensor = "torch._tensor.Tensor"
    expected = ["MinGRUConfig", "MinConvGRUForVideoClassification", "Tensor", f"tuple[{tensor}, {tensor}]"]
    assert types == expected, report
    assert "error" not in report


# --- Servers, evaluation, other runtimes


@pytest.mark.clients("transformers serve")
@pytest.mark.parametrize("options", [(), ("--continuous-batching",)], ids=["alone", "batched"])
def test_server_completes_and_chats(directory, model, tokenizer, tmp_path, options):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="`transformers serve` needs transformers[serving]")
    tokenizer = type(tokenizer).from_pretrained(directory)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        str(ROOT / "scripts" / "serve.py"),
        str(directory),
        "--port",
        str(port),
        "--device",
        "cpu",
        *options,
    ]
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)

    def ask(route, **request):
        data = json.dumps({"model": str(directory), **request}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/{route}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()

    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                log.seek(0)
                assert server.poll() is None, log.read()
                assert time.monotonic() < deadline, log.read()
                time.sleep(0.2)
        completion = ask("completions", prompt="the fox", max_tokens=8, temperature=0)
        request = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 8, "temperature": 0}
        chat = ask("chat/completions", **request)
        stream = ask("chat/completions", **request, stream=True)  # `transformers chat` requests a stream
    finally:
        server.terminate()
        server.wait(30)
        log.close()
    prompt = tokenizer("the fox", return_tensors="pt")
    expected = tokenizer.decode(greedy(model, prompt, 8)[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    assert json.loads(completion)["choices"][0]["text"] == expected
    assert json.loads(chat)["choices"][0]["message"]["content"] == expected
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {")]
    pieces = [choice["delta"].get("content") or "" for event in events for choice in json.loads(event)["choices"]]
    assert len(pieces) > 2
    assert "".join(pieces) == expected


@pytest.mark.clients("lm_eval")
@pytest.mark.filterwarnings("ignore")
def test_lm_evaluation_harness_scores_a_local_task(directory, model, tokenizer, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="the harness is lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    questions = [{"question": "the quick brown", "choices": ["fox", "dog"], "answer": i} for i in (0, 1)]
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(question) for question in questions))
    (tmp_path / "fox.yaml").write_text(f"""
task: fox
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "questions.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=2),
        tasks=["fox"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    scores = []
    for choice in ("fox", "dog"):
        ids = tokenizer(f"the quick brown {choice}", return_tensors="pt").input_ids
        with torch.no_grad():
            scores.append(model(ids).logits[0, -5:-1].log_softmax(-1).gather(1, ids[0, -4:, None]).sum().item())
    samples = results["samples"]["fox"]
    logliks = [response[0] for response in samples[0]["filtered_resps"]]
    assert logliks == pytest.approx(scores, abs=1e-3)
    assert results["results"]["fox"]["acc,none"] == 0.5  # both questions get the same answer, which is wrong once


@pytest.fixture
def export_onnx():
    """Load the export script, or skip the test if a package that it needs is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the export needs onnx, onnxscript and onnxruntime")
    return load_script("export_onnx")


@pytest.mark.clients("onnxruntime")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("kind", ["paper", "stack"])
def test_onnx_gives_the_same_tokens_from_standard_operators(kind, export_onnx, tmp_path):
    import onnx

    sizes = {
        "paper": {"hidden_size": 16, "num_hidden_layers": 2},
        "stack": {"hidden_size": 8, "hidden_sizes": [12, 16], "conv_kernel": 0, "expand": 1, "use_mlp": False},
    }[kind]
    model = MinGRUForCausalLM(MinGRUConfig(vocab_size=40, initializer_range=0.3, **sizes)).eval()
    export_onnx.export(model, tmp_path)
    for batch, steps in ((1, 1), (3, 50)):
        ids = torch.randint(0, 40, (batch, steps))
        expected = greedy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0})
        assert np.array_equal(export_onnx.generate(tmp_path, ids.numpy(), 12), expected.numpy())
    operators = {}
    for name in ("prefill", "decode"):
        graph = onnx.load(tmp_path / f"{name}.onnx")
        assert {node.domain for node in graph.graph.node} == {""}
        assert not graph.functions
        operators[name] = {node.op_type for node in graph.graph.node}
    assert "Scan" in operators["prefill"]
    assert not {"Scan", "Loop", "If"} & operators["decode"]


@pytest.mark.clients("onnxruntime")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("model_class", [MinGRUForSequenceClassification, MinGRUForTokenClassification])
def test_onnx_classifies_texts_and_tokens(model_class, export_onnx, tmp_path):
    import onnxruntime

    model = model_class(MinGRUConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, initializer_range=0.3)).eval()
    assert export_onnx.export(model, tmp_path) == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    ids = torch.randint(0, 40, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    [logits] = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    real = mask.bool() if logits.ndim == 3 else slice(None)
    assert logits[real] == pytest.approx(expected[real].numpy(), abs=1e-4)


@pytest.mark.clients("onnxruntime")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_onnx_classifies_clips_and_streams(bidirectional, export_onnx, tmp_path):
    import onnx

    backbone = ResNetConfig(hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", out_features=["stage1", "stage2"])
    config = MinConvGRUConfig(backbone_config=backbone, bidirectional=bidirectional, num_labels=5)
    model = MinConvGRUForVideoClassification(config).eval()
    (tmp_path / "frame.onnx").write_bytes(b"another model's")
    names = export_onnx.export(model, tmp_path, (48, 40))
    assert sorted(path.name for path in tmp_path.iterdir()) == names == ["clip.onnx", "frame.onnx"][: len(names)]
    assert len(names) == 2 - bidirectional
    for batch, steps in ((1, 1), (2, 9)):
        frames = torch.randn(batch, steps, 3, 48, 40)
        with torch.no_grad():
            expected = model(frames).logits.numpy()
        assert export_onnx.classify(tmp_path, frames.numpy()) == pytest.approx(expected, abs=1e-4)
    for name in names:
        graph = onnx.load(tmp_path / name)
        assert {node.domain for node in graph.graph.node} == {""}
        assert ("Scan" in {node.op_type for node in graph.graph.node}) == (name == "clip.onnx")


@pytest.mark.slow
@pytest.mark.clients("transformers")
def test_common_tests_of_transformers(tmp_path):
    """The tests that every model in transformers has to pass, from the sources of the installed version."""
    pytest.importorskip("parameterized", reason="the common tests of transformers need it")
    version = importlib.metadata.version("transformers")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    if subprocess.run([*command, f"transformers=={version}"], cwd=tmp_path).returncode:
        pytest.skip(f"the source distribution of transformers {version} cannot be downloaded")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"transformers-{version}"
    stubs = {  # modules that these tests import and the source distribution lacks
        "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
        "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
        "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    }
    for name, text in {"__init__.py": "", "conftest.py": "", **stubs}.items():
        path = source / "tests" / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    shutil.copy(ROOT / "tests" / "common_of_transformers.py", source / "tests")
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider"]
    process = subprocess.run(
        [*command, "tests/common_of_transformers.py"],
        cwd=source,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{source}"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    assert int(re.search(r"(\d+) passed", process.stdout)[1]) > 200
