"""Facts about the built-in model that tests name."""

from robustfeat.hub.catalog import builtin_model

_CONFIG = builtin_model().config

NAME = _CONFIG.name
SIDE = _CONFIG.preprocessing.image_size
SHAPE = [1, 3, SIDE, SIDE]
COUNT = 3 * SIDE**2
"""Numbers of an image that is preprocessed."""
