from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from robustfeat.errors import DataError
from robustfeat.training.concepts import assign_concepts, load_concepts

TABLE_1 = {
    "Animal": 121, "Artifact": 107, "Bird": 59, "Container": 56, "Device": 129, "Dog": 118,
    "Instrumentality": 106, "Mammal": 100, "Structure": 57, "Vehicle": 67, "Others": 80,
}  # fmt: skip


def test_imagenets_concepts_have_the_counts_of_table_1() -> None:
    concepts = load_concepts("imagenet11")
    assert Counter(concepts.values()) == TABLE_1
    assert concepts["n01443537"] == "Animal"  # goldfish
    assert concepts["n02099712"] == "Dog"  # Labrador retriever


def test_concepts_are_assigned_by_class_name() -> None:
    result = assign_concepts("imagenet11", ["n02099712", "n01443537", "n02105412"], np.array([5, 5, 5]))
    assert result.names == ("Animal", "Dog")
    assert result.of_class.tolist() == [1, 0, 1]


def test_concepts_without_examples_are_dropped_and_named() -> None:
    result = assign_concepts("imagenet11", ["n02099712", "n01443537"], np.array([0, 5]))
    assert result.names == ("Animal",)
    assert "Dog" in result.empty
    assert "Bird" in result.empty


def test_each_class_can_be_its_own_concept() -> None:
    result = assign_concepts("classes", ["b", "a"], np.array([1, 1]))
    assert result.names == ("a", "b")
    assert result.of_class.tolist() == [1, 0]


WNIDS = sorted(load_concepts("imagenet11"))


@pytest.mark.parametrize(
    "names",
    [
        [str(number) for number in range(1000)],
        sorted(str(number) for number in range(1000)),  # as class folders are: 0, 1, 10, 100
        ["tench, Tinca tinca", *(f"class {number}" for number in range(1, 1000))],
        ["Tench", *(f"class {number}" for number in range(1, 1000))],
    ],
    ids=["numbers", "numbers as text", "words", "capitals"],
)
def test_imagenets_classes_under_other_names(names: list[str]) -> None:
    result = assign_concepts("imagenet11", names, np.ones(1000, np.int64))
    assert Counter(result.names[concept] for concept in result.of_class) == TABLE_1
    place = {wnid: number for number, wnid in enumerate(WNIDS)}
    for wnid, concept in (("n01443537", "Animal"), ("n02099712", "Dog"), ("n04285008", "Vehicle")):
        number = place[wnid]  # goldfish is 1, Labrador retriever 208, sports car 817
        of = names.index(str(number)) if names[0] == "0" else number
        assert result.names[result.of_class[of]] == concept
    assert (place["n01443537"], place["n02099712"], place["n04285008"]) == (1, 208, 817)
    assert result.empty == ()


@pytest.mark.parametrize(
    "names",
    [
        [str(number) for number in range(1, 1001)],
        [str(number) for number in range(999)],
        [*(f"class {number}" for number in range(999)), "tench"],
        ["tench", *(f"class {number}" for number in range(998))],
        ["tench", *WNIDS[1:]],
    ],
    ids=["from 1", "one less", "tench last", "tench and one less", "wnids, too"],
)
def test_other_classes_are_not_taken_for_imagenets(names: list[str]) -> None:
    with pytest.raises(DataError, match="classes have no concept"):
        assign_concepts("imagenet11", names, np.ones(len(names), np.int64))


def test_a_class_without_a_concept_is_named(tmp_path: Path) -> None:
    file = tmp_path / "c.csv"
    file.write_text("class,concept\ncat,Animal\n")
    with pytest.raises(DataError, match="1 of 2 classes have no concept, first 'car'"):
        assign_concepts(str(file), ["cat", "car"], np.array([1, 1]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line must be class,concept; got nothing"),
        ("name,group\na,b\n", "got name,group"),
        ("class,concept\ncat\n", "line 2 needs"),
        ("class,concept\ncat,A\ncat,B\n", "line 3 gives class 'cat' a second concept, 'B'"),
    ],
)
def test_a_bad_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        load_concepts(str(file))
