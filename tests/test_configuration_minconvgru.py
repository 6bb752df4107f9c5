"""The video model's configuration: round trips, derived values, and refused values."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, ConvNextConfig, ResNetConfig, TimmBackboneConfig

from mingru_hf import MinConvGRUConfig

BACKBONES = {
    "default": None,
    "resnet": ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], out_features=["stem", "stage2"]),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, out_indices=[1, 2]),
    "timm": TimmBackboneConfig(backbone="vgg16", out_indices=[0, 1, 2, 3, 4]),
    "dict": {"model_type": "resnet", "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage1"]},
}


@pytest.mark.parametrize(("backbone", "num_stages"), list(zip(BACKBONES, [4, 2, 2, 5, 1], strict=True)))
def test_round_trip_through_json(backbone, num_stages, tmp_path):
    config = MinConvGRUConfig(backbone_config=BACKBONES[backbone], id2label={0: "left", 1: "right", 2: "up"}, stride=1)
    assert config.num_stages == num_stages
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MinConvGRUConfig
    assert type(loaded.backbone_config) is type(config.backbone_config)
    loaded._name_or_path = config._name_or_path
    assert loaded.to_dict() == config.to_dict()
    assert loaded.num_stages == num_stages
    assert loaded.num_labels == 3
    assert loaded.stride == 1


def test_scan_backend_is_a_choice_for_one_run(tmp_path):
    config = MinConvGRUConfig(scan_backend="torch")
    assert config.scan_backend == "torch"
    config.save_pretrained(tmp_path)
    assert "scan_backend" not in json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).scan_backend == "auto"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone_config": {"model_type": "bert"}}, "got a BertConfig: it has no out_indices"),
        ({"backbone_config": ResNetConfig(out_indices=[1]), "hidden_sizes": [8, 8]}, "backbone's 1 stages"),
        ({"hidden_sizes": [8, 8, 8, 0]}, "hidden_sizes must be at least 1"),
        ({"feature_pooling": [True]}, "backbone's 4 stages"),
        ({"feature_pooling": (True,)}, "backbone's 4 stages"),
        ({"hidden_sizes": (8, 8)}, "backbone's 4 stages"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"kernel_size": 0}, "kernel_size must be at least 1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"padding": -1}, "padding must be at least 0"),
        ({"pooled_size": 0}, "pooled_size must be at least 1"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"dropout": 1.5}, "dropout must be a probability"),
        ({"classifier_dropout": -0.1}, "classifier_dropout must be a probability"),
        ({"backbone_chunk_size": -1}, "backbone_chunk_size must be a number of frames"),
        ({"scan_backend": "fast"}, "scan_backend"),
    ],
)
def test_impossible_models_are_refused(arguments, message):
    with pytest.raises(StrictDataclassError, match=message):
        MinConvGRUConfig(**arguments)


@pytest.mark.parametrize(
    ("backbone_config", "message"),
    [
        ({"model_type": "nosuch"}, "needs a model_type that transformers knows.* got 'nosuch'"),
        ({"hidden_sizes": [8]}, "needs a model_type"),
        ({"model_type": "resnet", "out_features": ["stage9"]}, "out_features must be a subset"),
        ({"model_type": "resnet", "out_indices": [9]}, "out_indices must be valid indices"),
    ],
)
def test_backbones_that_are_not_there_are_refused(backbone_config, message):
    with pytest.raises(ValueError, match=message):
        MinConvGRUConfig(backbone_config=backbone_config)
