"""Run on our models the common tests that every model in transformers has to pass.

Only the source distribution of transformers contains these tests. `test_common_tests_of_transformers` downloads it,
copies this file into its `tests` directory and runs pytest there. The tests skipped below need features that these
models do not have.
"""

import unittest

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_video_processing_common import VideoProcessingTestMixin, prepare_video_inputs
from transformers import ResNetConfig
from transformers.models.auto import modeling_auto

from mingru_hf import (
    MinConvGRUConfig,
    MinConvGRUForVideoClassification,
    MinConvGRUModel,
    MinConvGRUVideoProcessor,
    MinGRUConfig,
    MinGRUForCausalLM,
    MinGRUForSequenceClassification,
    MinGRUForTokenClassification,
    MinGRUModel,
)

# The tests look up models by name in these mappings to find out which labels a model takes.
for mapping, model_type, model_class in [
    ("MODEL_MAPPING_NAMES", "mingru", MinGRUModel),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "mingru", MinGRUForCausalLM),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "mingru", MinGRUForSequenceClassification),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "mingru", MinGRUForTokenClassification),
    ("MODEL_MAPPING_NAMES", "minconvgru", MinConvGRUModel),
    ("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES", "minconvgru", MinConvGRUForVideoClassification),
]:
    getattr(modeling_auto, mapping)[model_type] = model_class.__name__


class PaperTester:
    """The paper's block."""

    base_model_class = MinGRUModel
    is_training = True
    batch_size, seq_length, vocab_size, hidden_size, num_hidden_layers = 4, 7, 99, 32, 2
    options: dict = {}

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self):
        sizes = {name: getattr(self, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return MinGRUConfig(**sizes, **special, **self.options, num_labels=3)

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 3) + 3
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class StackTester(PaperTester):
    """torch-mingru's stack: no convolution, no MLP, no projection back."""

    options = {"conv_kernel": 0, "expand": 1, "use_mlp": False}


class TextTests(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (
        MinGRUModel,
        MinGRUForCausalLM,
        MinGRUForSequenceClassification,
        MinGRUForTokenClassification,
    )
    has_attentions = False


class PaperTest(TextTests, unittest.TestCase):
    def setUp(self):
        self.model_tester = PaperTester(self)

    def test_config(self):
        common = ["hidden_size", "num_hidden_layers"]
        ConfigTester(self, config_class=MinGRUConfig, common_properties=common, hidden_size=37).run_common_tests()


class StackTest(TextTests, unittest.TestCase):
    def setUp(self):
        self.model_tester = StackTester(self)


class VideoTester:
    base_model_class = MinConvGRUModel
    is_training = True
    batch_size, seq_length, image_size, num_hidden_layers = 2, 3, 16, 2

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self):
        sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
        backbone = ResNetConfig(**sizes, out_features=["stage1", "stage2"])
        return MinConvGRUConfig(backbone_config=backbone, num_labels=3)

    def prepare_config_and_inputs_for_common(self):
        frames = floats_tensor([self.batch_size, self.seq_length, 3, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": frames}


class VideoTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MinConvGRUModel, MinConvGRUForVideoClassification)
    has_attentions = False
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = VideoTester(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is MinConvGRUForVideoClassification:
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
        return inputs

    def test_config(self):
        ConfigTester(self, config_class=MinConvGRUConfig, has_text_modality=False).run_common_tests()

    @unittest.skip("There are no token embeddings; only the backbone may have any.")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("Frames have shapes of their own; see tests/test_modeling_minconvgru.py.")
    def test_hidden_states_output(self):
        pass


class VideoProcessorTester:
    batch_size, num_channels, num_frames = 5, 3, 8

    def prepare_video_processor_dict(self):
        sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}}
        return {**sizes, "do_convert_rgb": True, "num_frames": 4}

    def expected_output_video_shape(self, videos):
        return [4, self.num_channels, 18, 18]

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        sizes = {"min_resolution": 30, "max_resolution": 80, "equal_resolution": equal_resolution}
        counts = self.batch_size, self.num_frames, self.num_channels
        return prepare_video_inputs(*counts, **sizes, return_tensors=return_tensors)


class VideoProcessorTest(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = MinConvGRUVideoProcessor

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VideoProcessorTester()

    @property
    def video_processor_dict(self):
        return self.video_processor_tester.prepare_video_processor_dict()

    @unittest.skip("With `fps`, too, a clip has `num_frames` frames; see tests/test_video_processing_minconvgru.py.")
    def test_call_sample_frames(self):
        pass
