"""Training sets, and the batches made of them."""

from robustfeat.training.data.batches import Batch, EpochPlan, EvaluationBatches, TrainingBatches, load_batches
from robustfeat.training.data.cache import CachedSet, build_cache, cached_batches, require_room
from robustfeat.training.data.hub_dataset import is_hub_dataset
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import are_class_folders, open_splits, open_training_data

__all__ = [
    "Batch",
    "CachedSet",
    "EpochPlan",
    "EvaluationBatches",
    "ImageSet",
    "TrainingBatches",
    "are_class_folders",
    "build_cache",
    "cached_batches",
    "is_hub_dataset",
    "load_batches",
    "open_splits",
    "open_training_data",
    "require_room",
]
