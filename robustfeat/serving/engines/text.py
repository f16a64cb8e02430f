"""Embeds texts in the space of a model's features, with the text tower beside its image network."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError, InputError, ModelFolderError, first_line
from robustfeat.hub.external_data import inline_external_data
from robustfeat.hub.folder import ModelFolder
from robustfeat.hub.onnx_layout import TOKENIZER, TOKENIZER_SETTINGS, external_names, find_text_network
from robustfeat.hub.outputs import TextTower
from robustfeat.serving.engines.engine import open_on_processor
from robustfeat.serving.engines.options import RunOptions

__all__ = ["TextEncoder"]

_TOKENIZER_BYTES = 2**26
_TEXT_CHARACTERS = 100_000
_LOWERCASED = ("Gemma", "Siglip2")
"""Prefixes of `tokenizer_class` that need lower case. SigLIP 2 was trained so, but its tokenizer.json omits it."""


class TextEncoder:
    """The text tower of a model, run by ONNX Runtime on the processor.

    Args:
        folder: a model in the layout of transformers.js.
        options: the preferred precision, the number of threads, and the pooling of images.
        feature_size: D, the length of image features.

    Raises:
        InputError: the model has no text tower, or its image features are in another space.
        ModelFolderError, HubError: files are missing, damaged or cannot be downloaded.
        EngineError: the package tokenizers or ONNX Runtime is missing.
    """

    def __init__(self, folder: ModelFolder, options: RunOptions, feature_size: int) -> None:
        tower = folder.config.outputs.text if folder.config.outputs else None
        names = folder.names_beside() if tower else []
        network = find_text_network(names, options.stored_precision)
        if tower is None or network is None or TOKENIZER not in names:
            needed = "onnx/text_model.onnx" if network is None else TOKENIZER
            why = f" ({needed} is missing, or not downloaded)" if tower else ""
            raise InputError(
                f"{folder.source}: the model has no text tower{why}",
                fix="use a model like CLIP or SigLIP in the layout of transformers.js, such as "
                "Xenova/clip-vit-base-patch32",
            )
        if options.pooling != tower.pooling:
            raise InputError(
                f"{folder.source}: text search needs features of `pooling={tower.pooling}`; these have "
                f"`pooling={options.pooling}`",
                fix="embed the images again",
            )
        self._tower, self._place, self._size = tower, folder.path / network, feature_size
        self._tokenizer = _open_tokenizer(folder, tower)
        self._session = open_on_processor(self._place, _read_network(folder, network, names), options.thread_count)
        self._inputs = [value.name for value in self._session.get_inputs()]
        given = [value.name for value in self._session.get_outputs()]
        if "input_ids" not in self._inputs or tower.output not in given:
            raise ModelFolderError(
                f"{self._place}: needs an input input_ids and an output {tower.output}; it has "
                f"{', '.join(self._inputs)} and {', '.join(given)}",
                fix="export the text tower with its projection",
            )

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeds n texts to (n, D) float32, comparable with image features by cosine.

        Raises:
            InputError: a text is empty or very long.
            EngineError: the network fails.
        """
        for text in texts:
            if not text.strip() or len(text) > _TEXT_CHARACTERS:
                raise InputError(
                    f"a text to search for has {len(text):,} characters", fix="describe the image in a few words"
                )
        rows = [self._embed(text) for text in texts]  # one by one, so padding cannot change a vector
        return np.concatenate([np.empty((0, self._size), np.float32), *rows])

    def _embed(self, text: str) -> NDArray[np.float32]:
        ids = np.array([self._tokenizer.encode(text).ids], np.int64)
        known = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
            "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
        }
        try:
            feed = {name: known[name] for name in self._inputs}
            vector: NDArray[np.float32] = self._session.run([self._tower.output], feed)[0]
        except Exception as exc:  # ONNX Runtime's exceptions share no base class of their own
            raise EngineError(f"{self._place}: cannot embed a text ({first_line(exc)})") from exc
        if vector.shape != (1, self._size) or not np.isfinite(vector).all():
            raise EngineError(
                f"{self._place}: {self._tower.output} must be finite, of shape {(1, self._size)} like image features; "
                f"got {vector.shape}",
                fix="export both towers of the same model",
            )
        return vector.astype(np.float32, copy=False)


def _read_network(folder: ModelFolder, network: str, names: Sequence[str]) -> bytes:
    beside = set(external_names(names, network))

    def read(place: str) -> bytes:
        name = posixpath.normpath(posixpath.join(posixpath.dirname(network), place))
        if name not in beside:
            raise ValueError(f"it refers to {name!r}")
        return folder.read_beside(name)

    try:
        return inline_external_data(folder.read_beside(network), read)
    except ValueError as exc:
        raise ModelFolderError(f"{folder.path / network}: cannot be used ({exc})") from exc


def _open_tokenizer(folder: ModelFolder, tower: TextTower) -> Any:
    try:
        import tokenizers
    except ImportError as exc:
        raise EngineError("tokenizers is not installed", fix="pip install 'robustfeat[text]'") from exc
    file, content = folder.path / TOKENIZER, folder.read_beside(TOKENIZER)
    if len(content) > _TOKENIZER_BYTES:
        raise ModelFolderError(f"{file}: has {len(content):,} bytes, over the limit of {_TOKENIZER_BYTES:,}")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as exc:  # the library raises Exception itself
        raise ModelFolderError(f"{file}: not a tokenizer ({first_line(exc)})") from exc
    own, told = tokenizer.padding, _read_settings(folder)
    tokenizer.enable_truncation(tower.most_tokens)
    tokenizer.no_padding()
    if tower.pad_token is not None:
        # As in transformers, the tokenizer's settings take precedence over the network's.
        pad = told.get("pad_token")
        number = tokenizer.token_to_id(str(pad["content"] if isinstance(pad, dict) and "content" in pad else pad))
        if number is None:
            number = own["pad_id"] if own else tower.pad_token
        tokenizer.enable_padding(length=tower.most_tokens, pad_id=number)
    if str(told.get("tokenizer_class")).startswith(_LOWERCASED):
        lower = tokenizers.normalizers.Lowercase()
        known = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = tokenizers.normalizers.Sequence([lower, *known])
    return tokenizer


def _read_settings(folder: ModelFolder) -> dict[str, Any]:
    """Reads tokenizer_config.json; empty if it is missing."""
    if TOKENIZER_SETTINGS not in folder.names_beside():
        return {}
    try:
        settings = json.loads(folder.read_beside(TOKENIZER_SETTINGS))
    except (ValueError, RecursionError) as exc:
        raise ModelFolderError(f"{folder.path / TOKENIZER_SETTINGS}: not valid JSON ({first_line(exc)})") from exc
    return settings if isinstance(settings, dict) else {}
