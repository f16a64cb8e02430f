"""The model card: the Hub's metadata, read back by the Hub's own client, and the numbers in it."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard, ModelCardData

from robustfeat.hub.card import render_card
from robustfeat.hub.catalog import builtin_model
from robustfeat.hub.config import Evaluation, ModelConfig
from robustfeat.hub.preprocessing import Preprocessing
from tests.hub_server import card_problems


def config(**changes: object) -> ModelConfig:
    plain = ModelConfig("a-v1", "resnet18", 512, 10, Preprocessing(64), provenance={"source": "timm:resnet18"})
    return plain.replace(**changes)


def test_the_builtin_card_is_the_one_that_its_config_gives() -> None:
    folder = builtin_model()
    assert (folder.path / "README.md").read_text("utf-8") == render_card(folder.config)


@pytest.mark.parametrize("provenance", [{}, {"license": "apache-2.0", "datasets": ["org/photos"]}])
def test_the_hubs_client_reads_the_metadata(provenance: dict[str, object]) -> None:
    evaluations = (
        Evaluation("CIFAR-10", "uoft-cs/cifar10", "accuracy", 68.5, "test", "linear SVM"),
        Evaluation("My photos: a test", "photos", "accuracy", 90.0),
    )
    text = render_card(config(evaluations=evaluations, provenance=provenance))
    assert card_problems(text) == []
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    assert (data.library_name, data.pipeline_tag) == ("timm", "image-feature-extraction")
    assert {"robustfeat", "onnx"} <= set(data.tags or ())
    assert (data.license, data.datasets) == (provenance.get("license", "other"), provenance.get("datasets"))
    found = [(result.dataset_name, result.dataset_type, result.metric_value) for result in data.eval_results or ()]
    assert found == [("CIFAR-10", "uoft-cs/cifar10", 68.5), ("My photos: a test", "photos", 90.0)]
    assert "| CIFAR-10 | test | linear SVM | accuracy | 68.5 |" in text


def test_a_name_with_a_bar_or_two_lines_stays_one_cell() -> None:
    evaluations = (Evaluation("cats | dogs\nat home", "org/pets", "accuracy", 90.0, "test", "SVM"),)
    assert "| cats \\| dogs at home | test | SVM | accuracy | 90.0 |" in render_card(config(evaluations=evaluations))


def test_a_licence_that_the_hub_does_not_know_is_another_one() -> None:
    text = render_card(config(provenance={"license": "DINOv3 License"}))
    assert card_problems(text) == []
    assert "license: other\nlicense_name: dinov3-license\n" in text


def test_a_card_without_numbers_claims_none() -> None:
    text = render_card(config())
    assert card_problems(text) == []
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    assert data.eval_results is None
    assert "## Results" not in text


def test_the_hub_of_the_tests_finds_fault_with_bad_cards() -> None:
    config = builtin_model().config
    good = render_card(config)
    for old, new in [
        ("license: other", "license: my-own"),
        ("license_name: see-terms\n", ""),
        (f"value: {config.evaluations[-1].value}", "value: much"),
        ("type: uoft-cs/cifar10\n", ""),
        ("pipeline_tag: image-feature-extraction", "pipeline_tag: magic"),
    ]:
        assert old in good
        assert card_problems(good.replace(old, new)), old
