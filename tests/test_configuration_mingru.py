"""The text model's configuration: round trips, derived values, and refused values."""

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from mingru_hf import MinGRUConfig, MinGRUForCausalLM

CONFIGS = Path(__file__).parent.parent / "scripts" / "configs"


def test_round_trip_through_json(tmp_path):
    config = MinGRUConfig(vocab_size=9, hidden_size=4, hidden_sizes=[4, 8], tie_word_embeddings=False, expand=1.5)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MinGRUConfig
    loaded._name_or_path = config._name_or_path
    assert loaded.to_dict() == config.to_dict()
    assert loaded.num_hidden_layers == 2
    assert loaded.block_sizes == [4, 8]


def test_scan_backend_is_a_choice_for_one_run(tmp_path):
    config = MinGRUConfig(scan_backend="torch")
    assert config.scan_backend == "torch"
    config.save_pretrained(tmp_path)
    assert "scan_backend" not in json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).scan_backend == "auto"
    assert AutoConfig.from_pretrained(tmp_path, scan_backend="reference").scan_backend == "reference"


def test_trainer_can_leave_the_cache_out():
    assert MinGRUConfig().keys_to_ignore_at_inference == ["cache"]  # a list, because Trainer adds a list to it


def test_a_dynamic_cache_can_be_built_from_it():
    cache = DynamicCache(config=MinGRUConfig(num_hidden_layers=3))
    assert len(cache) == 3
    assert cache.get_seq_length() == 0
    assert cache.is_croppable


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be above 0"),
        ({"hidden_size": -1}, "hidden_size must be above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be above 0"),
        ({"hidden_sizes": [4, 0]}, r"hidden_sizes\[1\] must be above 0"),
        ({"hidden_sizes": [4, 8], "num_hidden_layers": 3}, "has 2 entries, but num_hidden_layers is 3"),
        ({"hidden_sizes": []}, "hidden_sizes is empty"),
        ({"hidden_size": 4, "expand": 0.1}, "without channels"),
        ({"expand": float("inf")}, "expand must be above 0 and finite, got inf"),
        ({"norm_eps": -1.0}, "norm_eps must be 0 or above"),
        ({"initializer_range": float("nan")}, "initializer_range must be 0 or above and finite, got nan"),
        ({"conv_kernel": 1}, "conv_kernel must be 0"),
        ({"use_out_proj": False, "expand": 2}, "needs expand=1"),
        ({"residual_dropout": 1.5}, "residual_dropout must be a probability"),
        ({"initial_memory": 0.5}, "initial_memory must be at least 1 step"),
        ({"initial_memory": float("nan")}, "initial_memory must be at least 1 step and finite, got nan"),
        ({"initial_memory": float("inf")}, "initial_memory must be at least 1 step and finite, got inf"),
        ({"initial_memory": 64, "use_bias": False}, "needs use_bias=True"),
        ({"hidden_size": 4, "hidden_sizes": [4, 8], "tie_word_embeddings": True}, "got 8 and 4"),
        ({"norm_type": "batch_norm"}, "norm_type"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"intermediate_size": 0}, "intermediate_size must be above 0"),
        ({"hidden_act": "gelly"}, "hidden_act"),
        ({"scan_backend": "quick"}, "scan_backend"),
    ],
)
def test_impossible_sizes_are_refused(kwargs, message):
    with pytest.raises(StrictDataclassError, match=message):
        MinGRUConfig(**kwargs)


@pytest.mark.parametrize(
    ("saved", "override", "message"),
    [
        ({"hidden_sizes": [16, 16]}, {"num_hidden_layers": 1}, "has 2 entries, but num_hidden_layers is 1"),
        ({"expand": 1}, {"expand": 2}, "needs expand=1"),
    ],
)
def test_impossible_overrides_are_refused_when_a_model_is_loaded(saved, override, message, tmp_path):
    MinGRUForCausalLM(MinGRUConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, **saved)).save_pretrained(
        tmp_path
    )
    with pytest.raises(StrictDataclassError, match=message):
        MinGRUForCausalLM.from_pretrained(tmp_path, **override)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_build_models(path):
    config = MinGRUConfig.from_json_file(path)
    assert not set(json.loads(path.read_text())) - set(config.to_dict())  # no key that the config class does not know
    config.vocab_size = 11
    assert type(AutoModelForCausalLM.from_config(config)) is MinGRUForCausalLM


def test_the_tensor_parallel_plan_can_be_replaced_and_is_not_saved():
    config = MinGRUConfig(expand=1, use_mlp=False)
    assert config.base_model_tp_plan == {"layers.*.mixer.gate_hidden": "colwise_gather_output"}
    assert "base_model_tp_plan" not in config.to_json_string(use_diff=False)
    config.base_model_tp_plan = {}
    assert MinGRUConfig.from_dict({"base_model_tp_plan": None}).base_model_tp_plan is None
