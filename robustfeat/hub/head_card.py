"""Renders the card of a head from head.json for a push."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustfeat.counts import format_count
from robustfeat.hub.card import PLACE, license_fields
from robustfeat.hub.markdown import table
from robustfeat.hub.outputs import POOLED
from robustfeat.hub.remote import is_commit, is_hub_name

__all__ = ["HEAD_TAG", "render_head_card"]

HEAD_TAG = "robustfeat-head"
"""Tag of robustfeat's heads on the Hub."""

_MOST_CLASSES = 500
_BUILTIN, _UNKNOWN = "builtin", "MODEL"


def render_head_card(about: Mapping[str, Any], sha256: str, license_id: str | None = None) -> str:
    """Renders a card with the Hub's metadata: use, model, scores and classes.

    The card contains `PLACE` instead of the repository's name. A push replaces it.

    Args:
        about: the content of head.json.
        sha256: the sha256 of head.json.
        license_id: the Hub's name of a license; None for none.
    """
    classes = about["classes"]
    several = ", several of which may apply" if about["multi_label"] else ""
    rows = about["selection"].get("rows")
    fitted = f"fitted on {format_count(rows, 'image')}" if isinstance(rows, int) else "fitted elsewhere"
    return f"""\
---
{_metadata(about, license_id)}
---

# {PLACE}

A head of robustfeat: a classifier of image features ({about["kind"]}), {fitted}.
It distinguishes {len(classes)} classes{several}.

## Use

```bash
robustfeat svm predict {PLACE} photos/{_model_options(about["model"])}
robustfeat serve --head {PLACE}{_model_options(about["model"])}
```

```python
from robustfeat import FeatureExtractor, Head

head = Head.from_pretrained("{PLACE}")
extractor = FeatureExtractor.from_pretrained({_model_arguments(about["model"])})
print(head.predict(extractor.embed(["photo.jpg"])))
```

`{PLACE}@v1` is the tag `v1`; in Python it is `revision="v1"`. The sha256 of head.json pins both files, as in
`Head.from_pretrained("{PLACE}", sha256="...")`: `{sha256}`.

## Model

{_model(about["model"])}

## Scores

{_scores(about)}
## Classes

{_classes(classes)}

## Terms and limits

License of the head: {license_id or "not stated"}. The model has its own.

A head is numbers and names; nothing in it is executed. It predicts one of its classes for any image. Images of no
known class have a low `typicality`.
"""


def _metadata(about: Mapping[str, Any], license_id: str | None) -> str:
    from huggingface_hub import ModelCardData

    place, _ = _place(about["model"])
    data = ModelCardData(
        library_name="robustfeat",
        pipeline_tag="image-classification",
        base_model=None if place == _UNKNOWN else place,
        tags=[HEAD_TAG, "image-classification"],
        **({} if license_id is None else license_fields(license_id)),
    )
    return str(data.to_yaml(line_break="\n")).strip()


def _place(model: Mapping[str, Any] | None) -> tuple[str | None, dict[str, str]]:
    """The name of the head's model, or None for the built-in one, and the options that it needs."""
    facts = model or {}
    source, revision, pooling = (facts.get(name) for name in ("source", "revision", "pooling"))
    if source == _BUILTIN:
        return None, {}
    known = isinstance(source, str) and is_hub_name(source)  # another program may have written head.json
    options = {"revision": revision} if known and is_commit(revision) else {}
    return source if known else _UNKNOWN, options | ({"pooling": pooling} if pooling in POOLED else {})


def _model_options(model: Mapping[str, Any] | None) -> str:
    """The head's model as options of the command line."""
    place, options = _place(model)
    named = {} if place is None else {"model": place}
    return "".join(f" --{name} {value}" for name, value in (named | options).items())


def _model_arguments(model: Mapping[str, Any] | None) -> str:
    """The head's model as arguments in Python."""
    place, options = _place(model)
    first = [] if place is None else [f'"{place}"']
    return ", ".join([*first, *(f'{name}="{value}"' for name, value in options.items())])


def _model(model: Mapping[str, Any] | None) -> str:
    if model is None:
        return "The head does not name its model."
    rows = {
        "name": model["name"],
        "source": model.get("source") or f"a folder, `{_UNKNOWN}` above",
        "revision": model["revision"],
        "pooling": model.get("pooling"),
        "features": model["feature_size"],
        "sha256 of its weights": model["weights_sha256"],
        "hash of its preprocessing": model["preprocessing_hash"],
    }
    facts = table([{"": name, "model": value} for name, value in rows.items() if value is not None])
    return f"The head refuses features of another model.\n\n{facts.strip()}"


def _scores(about: Mapping[str, Any]) -> str:
    """Scores measured on held-out rows."""
    lines = []
    for name, scores in about["scores"].items():
        numbers = {
            key.replace("_", " "): f"{value:.4g}"
            for key, value in (scores.items() if isinstance(scores, Mapping) else ())
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if numbers:
            lines.append({"measured on": name.replace("_", " "), **numbers})
    if not lines:
        return "No scores were measured.\n"
    selected = "The held-out rows also chose the settings, so scores on new images are more reliable.\n"
    return table(lines) + "\n" + selected


def _classes(classes: list[str | int]) -> str:
    texts = (" ".join(str(name).split()).replace("`", "'") for name in classes[:_MOST_CLASSES])
    names = [f"`{text}`" for text in texts]
    more = len(classes) - len(names)
    return ", ".join(names) + (f" and {more:,} more, in head.json" if more else "")
