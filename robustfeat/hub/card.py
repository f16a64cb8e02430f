"""The model card, README.md of a model folder, rendered from the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustfeat.hub.config import ModelConfig

__all__ = ["render_card"]


def render_card(config: ModelConfig) -> str:
    """Markdown with the Hub's metadata in front: what the model is, how to use it, how it was made, how it fares."""
    contract = config.preprocessing
    card = f"""\
{_front_matter()}
# {config.name}

{config.architecture}, {config.feature_size} features an image, input {contract.image_size} px. {_origin(config)}

## Use

```bash
pip install 'robustfeat[cpu]'
robustfeat embed images/ --out feats.npy --model FOLDER
```

```python
from robustfeat import FeatureExtractor

fx = FeatureExtractor.from_pretrained("FOLDER")
features = fx.embed(["a.jpg"])  # (1, {config.feature_size}) float32
```

The same folder loads in timm and gives the same features:

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0).eval()
```

## Preprocessing

Upright RGB; the shorter side to {contract.resize_size} px ({contract.interpolation}, antialiased); centre crop of
{contract.image_size} px; mean {list(contract.mean)}, std {list(contract.std)}.
Hash `{contract.hash}`.
"""
    if config.results:
        card += "\n## Results\n\n" + "\n".join(_table(name, rows) for name, rows in config.results.items())
    if config.recipe:
        card += "\n## Recipe\n\n" + _recipe_table(config.recipe)
    return f"""{card}
## Terms and limits

{config.provenance.get("terms", "not stated")}

The features are meant for a linear classifier on top. Robust here means trained against shifts of examples and
concepts; nothing is claimed against adaptive attacks.
"""


def _front_matter() -> str:
    return """\
---
library_name: timm
pipeline_tag: image-feature-extraction
license: other
license_name: see-terms
tags:
- robustfeat
- onnx
- image-feature-extraction
---
"""


def _origin(config: ModelConfig) -> str:
    method = config.recipe.get("method")
    if not method:
        return f"Imported: {config.provenance.get('source', 'unknown')}."
    return (
        f"Pre-trained with {str(method).upper()} ([Qian, Hu and Li, CVPR 2020](https://arxiv.org/abs/1911.04047)) "
        f"on {config.provenance['data']['images']:,} images in {config.num_classes} classes and "
        f"{len(config.concepts)} concepts."
    )


def _table(name: str, content: Any) -> str:
    """A result: text as it is, a list of rows (mappings with the same keys) as a table."""
    if not isinstance(content, list) or not content or not isinstance(content[0], Mapping):
        return f"{name}: {content}\n"
    columns = list(content[0])
    lines = [f"{name}:\n", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in content]
    return "\n".join(lines) + "\n"


def _recipe_table(recipe: Mapping[str, Any]) -> str:
    lines = ["| option | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in recipe.items())]
    return "\n".join(lines) + "\n"
