"""Renders the model card, README.md of a model folder, from the config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from robustfeat.counts import format_count
from robustfeat.hub.config import ModelConfig
from robustfeat.hub.markdown import cell, table
from robustfeat.hub.outputs import POOLED, read_outputs
from robustfeat.hub.preprocessing import Preprocessing

__all__ = ["PLACE", "describe_preprocessing", "license_fields", "render_card"]

PLACE = "ORG/NAME"
"""Placeholder in a card for the repository's name. A push replaces it."""

_LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m afl-3.0 artistic-2.0
    bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-permissive-2.0 ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2
    agpl-3.0 gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc ms-pl mpl-2.0 ncsa odc-by odbl ofl-1.1 osl-3.0 pddl
    postgresql unlicense wtfpl zlib apple-amlr unknown
    """.split()  # noqa: SIM905 - one a line would be sixty lines
)
"""The Hub's names of licenses. A card states any other license as `other` with a name."""


def render_card(config: ModelConfig) -> str:
    """Renders a card with the Hub's metadata: description, use, preprocessing, training and results.

    The card contains `PLACE` instead of the repository's name. A push replaces it.
    """
    contract = config.preprocessing
    card = f"""\
---
{_metadata(config)}
---

# {config.name}

{config.architecture}, {config.feature_size} features per image, input {contract.image_size} px. {_origin(config)}

## Use

`{PLACE}` may also be the path of a model folder. With robustfeat, embed a folder of images to `feats.npy`:

```bash
robustfeat embed images/ --out feats.npy --model {PLACE}
```

```python
from robustfeat import FeatureExtractor

fx = FeatureExtractor.from_pretrained("{PLACE}")
features = fx.embed(["photo.jpg"])
print(features.shape)  # (1, {config.feature_size})
```

{_elsewhere(config)}`onnx/model.onnx` runs in ONNX Runtime and OpenVINO: `pixel_values`
float32 (N, 3, {contract.image_size}, {contract.image_size}) to `features` float32 (N, {config.feature_size}).
{_int8(config)}
## Preprocessing

{describe_preprocessing(contract)}
Hash `{contract.hash}`.
"""
    if config.evaluations or config.results:
        card += "\n## Results\n"
    if config.evaluations:
        columns = ("dataset", "split", "protocol", "metric", "value")
        rows = [{name: getattr(evaluation, name) for name in columns} for evaluation in config.evaluations]
        card += "\n" + table(rows)
    for name, content in config.results.items():
        card += "\n" + _table(name, content)
    if config.recipe:
        card += "\n## Recipe\n\n" + _recipe_table(config.recipe)
    return f"""{card}
## Terms and limits

{config.provenance.get("terms", "not stated")}

The features are meant for a linear classifier. Robust means trained against shifts of examples and concepts.
Robustness against adaptive attacks is not claimed.
"""


def _elsewhere(config: ModelConfig) -> str:
    """Describes how another library loads the model."""
    if config.library == "onnx":
        return "Only the ONNX file has the weights, so PyTorch cannot load this model.\n"
    if config.library == "transformers":
        return _with_transformers(config)
    if config.library != "timm":
        return f"timm has no such network and cannot load this folder. {_own_library(config)}\n"
    without = "" if config.feature_outputs else ", num_classes=0"
    return f"""\
With timm, which gives the same features:

```python
import timm
import torch
from PIL import Image

model = timm.create_model("hf-hub:{PLACE}", pretrained=True{without}).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    features = model(transform(Image.open("photo.jpg").convert("RGB"))[None])
print(tuple(features.shape))  # (1, {config.feature_size})
```

(For a folder: `local-dir:` instead of `hf-hub:`.) """


def _int8(config: ModelConfig) -> str:
    """Describes the int8 file."""
    if not config.int8_share:
        return ""
    kept = "; the others stay in fp32" if config.int8["kept"] else ""
    return f"`onnx/model_int8.onnx` is the same network with {config.int8_share} in int8{kept}.\n"


def _own_library(config: ModelConfig) -> str:
    if config.library != "torchvision":
        return "`robustfeat train --init` reads `model.safetensors`."
    made = f'torchvision.models.get_model("{config.architecture.partition(":")[2]}"'
    if not config.num_classes:
        return f"`model.safetensors` has the parameters of `{made})` without `{config.classifier}`."
    return f"`model.safetensors` has the parameters of `{made}, num_classes={config.num_classes})`."


def _with_transformers(config: ModelConfig) -> str:
    name = config.architecture.partition(":")[2]
    prefix = read_outputs(config.transformers).prefix
    mean = ".mean((2, 3))" if prefix is None else f"[:, {prefix}:].mean(1)"
    pooled = {"embeds": "", "pooler": ".flatten(1)", "cls": "[:, 0]", "mean": mean}
    features = f"{POOLED[config.pooling]}{pooled[config.pooling]}" if config.pooling in POOLED else "pooler_output"
    return f"""\
With transformers, which gives the same features:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, {name}

model = {name}.from_pretrained("{PLACE}").eval()
processor = AutoImageProcessor.from_pretrained("{PLACE}")
with torch.no_grad():
    outputs = model(**processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt"))
features = outputs.{features}
print(tuple(features.shape))  # (1, {config.feature_size})
```

"""


def describe_preprocessing(contract: Preprocessing) -> str:
    """Describes the steps from an image to the network's input in two lines of text."""
    colours = contract.channel_order.upper() + (", transparent pixels on white" if contract.version > 1 else "")
    size = f"{contract.resize_size} px"
    sides = {
        "center": f"the shorter side to {size}",
        "squash": f"both sides to {size}, whatever the aspect ratio",
        "border": f"the longer side to {size}, padded to a square with the mean colour",
    }[contract.crop_mode]
    smooth = "" if contract.interpolation == "nearest" else ", antialiased"
    return (
        f"Upright {colours}; {sides} ({contract.interpolation}{smooth}); centre crop of\n"
        f"{contract.image_size} px; mean {list(contract.mean)}, std {list(contract.std)}."
    )


def _metadata(config: ModelConfig) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    data = ModelCardData(
        library_name=config.library,  # the Hub then shows how to load the model
        pipeline_tag="image-feature-extraction",
        **license_fields(config.provenance.get("license")),
        datasets=list(config.provenance.get("datasets", ())) or None,
        metrics=sorted({evaluation.metric for evaluation in config.evaluations}) or None,
        tags=["robustfeat", "onnx", "image-feature-extraction"],
        model_name=config.name if config.evaluations else None,  # required by model-index
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name=evaluation.protocol or None,
                dataset_type=evaluation.dataset_id,
                dataset_name=evaluation.dataset,
                dataset_split=evaluation.split,
                metric_type=evaluation.metric,
                metric_name=evaluation.metric,
                metric_value=evaluation.value,
            )
            for evaluation in config.evaluations
        ]
        or None,
    )
    return str(data.to_yaml(line_break="\n")).strip()


def license_fields(license_id: str | None) -> dict[str, Any]:
    """A card's metadata for a license. Without one, it points the Hub to the terms in the card's text."""
    text = license_id or "see-terms"
    if text in _LICENSES:
        return {"license": text}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", text.lower())}


def _origin(config: ModelConfig) -> str:
    method = config.recipe.get("method")
    if not method:
        return f"Imported: {config.provenance.get('source', 'unknown')}."
    classes = 0 if config.components_of else config.num_classes
    grouped = f"in {classes} classes and" if classes else "in"
    if not config.recipe.get("labels", True):
        grouped = "without labels, in"
    teacher, epoch = config.recipe.get("teacher"), config.provenance.get("epoch")
    return (
        f"Pre-trained with {_method(str(method))} "
        f"on {config.provenance['data']['images']:,} images {grouped} {format_count(len(config.concepts), 'concept')}."
        + (f" It learned from the features of `{cell(str(teacher))}`." if teacher else "")
        + (
            f" The features are the first {config.feature_size} principal components of the network's "
            f"{config.components_of:,}."
            if config.components_of
            else ""
        )
        + (f" The weights are from epoch {epoch} of {config.recipe.get('epochs')}, the best." if epoch else "")
    )


def _method(name: str) -> str:
    if name in {"el", "cl", "hrrl"}:
        return f"{name.upper()} ([Qian, Hu and Li, CVPR 2020](https://arxiv.org/abs/1911.04047))"
    return "ERM" if name == "erm" else f"`{name}`"


def _table(name: str, content: Any) -> str:
    """Renders a result. Text stays as it is; rows (mappings with the same keys) become a table."""
    if not isinstance(content, list) or not content or not isinstance(content[0], Mapping):
        return f"{name}: {content}\n"
    return f"{name}:\n\n{table(content)}"


def _recipe_table(recipe: Mapping[str, Any]) -> str:
    return table([{"option": key, "value": value} for key, value in recipe.items()])
