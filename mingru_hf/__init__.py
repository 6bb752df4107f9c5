"""MinGRU recurrent networks for Hugging Face Transformers.

The package provides layers with torch-mingru's interface (`MinGRU`, `MinConv2dGRU`, `Bidirectional`), text models that
train in parallel over time and generate with a constant-size state, video classifiers that can process a stream of
frames, and the scan that all of them run on (`mingru_scan`). Importing the package registers the models with
transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
)
from transformers.utils import is_torchvision_available

from .cache_mingru import MinGRUCacheLayer
from .configuration_minconvgru import MinConvGRUConfig
from .configuration_mingru import MinGRUConfig
from .layers import Bidirectional, MinConv2dGRU, MinConv2dGRUCell, MinGRU, MinGRUCell, spread_memory_
from .modeling_minconvgru import (
    MinConvGRUCache,
    MinConvGRUForVideoClassification,
    MinConvGRUModel,
    MinConvGRUPreTrainedModel,
)
from .modeling_mingru import (
    MinGRUForCausalLM,
    MinGRUForSequenceClassification,
    MinGRUForTokenClassification,
    MinGRUModel,
    MinGRUPreTrainedModel,
)
from .scan import mingru_scan
from .video_processing_minconvgru import MinConvGRUVideoProcessor

AutoConfig.register("mingru", MinGRUConfig, exist_ok=True)
AutoModel.register(MinGRUConfig, MinGRUModel, exist_ok=True)
AutoModelForCausalLM.register(MinGRUConfig, MinGRUForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MinGRUConfig, MinGRUForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(MinGRUConfig, MinGRUForTokenClassification, exist_ok=True)

AutoConfig.register("minconvgru", MinConvGRUConfig, exist_ok=True)
AutoModel.register(MinConvGRUConfig, MinConvGRUModel, exist_ok=True)
AutoModelForVideoClassification.register(MinConvGRUConfig, MinConvGRUForVideoClassification, exist_ok=True)
if is_torchvision_available():  # without torchvision, AutoVideoProcessor is a placeholder that registers nothing
    AutoVideoProcessor.register(MinConvGRUConfig, MinConvGRUVideoProcessor, exist_ok=True)

__version__ = "0.1.0"

__all__ = [
    "Bidirectional",
    "MinConv2dGRU",
    "MinConv2dGRUCell",
    "MinConvGRUCache",
    "MinConvGRUConfig",
    "MinConvGRUForVideoClassification",
    "MinConvGRUModel",
    "MinConvGRUPreTrainedModel",
    "MinConvGRUVideoProcessor",
    "MinGRU",
    "MinGRUCacheLayer",
    "MinGRUCell",
    "MinGRUConfig",
    "MinGRUForCausalLM",
    "MinGRUForSequenceClassification",
    "MinGRUForTokenClassification",
    "MinGRUModel",
    "MinGRUPreTrainedModel",
    "mingru_scan",
    "spread_memory_",
]
