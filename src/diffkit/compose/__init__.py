"""Settings -> live objects: the only place that turns names into things."""

from diffkit.compose.model import Model, load_model, model_of, model_path
from diffkit.compose.settings import contradiction, training_spec
from diffkit.compose.start import prepare_training
from diffkit.compose.tracking import Dropped, Trackers
from diffkit.compose.training import Training

__all__ = [
    "Dropped",
    "Model",
    "Trackers",
    "Training",
    "contradiction",
    "load_model",
    "model_of",
    "model_path",
    "prepare_training",
    "training_spec",
]
