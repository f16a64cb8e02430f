from pathlib import Path

import numpy as np
import pytest

from robustfeat.errors import InputError
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.recipe import Recipe, load_recipe, shipped_recipes


def test_the_defaults_are_the_papers() -> None:
    recipe = Recipe()
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.momentum, recipe.weight_decay) == (
        90,
        256,
        0.1,
        0.9,
        1e-4,
    )
    assert (recipe.q_warmup_steps, recipe.q_warmup_divisor) == (1000, 10)
    rates = [recipe.learning_rate(epoch) for epoch in (0, 29.9, 30, 59.9, 60, 89)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_cosine_schedule_falls_along_half_a_cosine() -> None:
    recipe = Recipe(schedule="cosine", warmup_epochs=2, epochs=12, lr=0.4)
    assert recipe.learning_rate(1) == pytest.approx(0.2)
    epochs = np.linspace(2, 12, 41)
    expected = 0.4 * np.cos(np.pi * (epochs - 2) / 20) ** 2  # (1 + cos 2a) / 2 = cos(a)^2
    np.testing.assert_allclose([recipe.learning_rate(epoch) for epoch in epochs], expected, atol=1e-15)
    assert recipe.learning_rate(13) == 0


def test_the_linear_schedule_rises_and_falls() -> None:
    recipe = Recipe(schedule="linear", warmup_epochs=2, epochs=12, lr=0.4)
    assert [recipe.learning_rate(epoch) for epoch in (0, 1, 2, 7, 12)] == pytest.approx([0, 0.2, 0.4, 0.2, 0])


def test_a_run_that_is_all_warm_up_has_a_rate_at_its_end() -> None:
    recipe = Recipe(schedule="linear", warmup_epochs=1, epochs=1, lr=0.4)
    assert [recipe.learning_rate(epoch) for epoch in (0.5, 1.0)] == pytest.approx([0.2, 0])


def test_image_sizes_grow_with_the_epochs() -> None:
    recipe = Recipe(image_sizes=((0, 32), (3, 48), (5, 64)))
    assert [recipe.image_size(epoch) for epoch in range(7)] == [32, 32, 32, 48, 48, 64, 64]


def test_validation_images_are_as_large_as_the_last_training_images(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("image_sizes = [[0, 24], [2, 32]]\n")
    recipe = load_recipe(str(file))
    assert recipe.preprocessing().image_size == 32
    assert recipe.override({"image_sizes": [[0, 48]]}).validation_size == 48
    assert recipe.override({"image_sizes": [[0, 48]], "validation_size": 64}).validation_size == 64
    assert recipe.override({"validation_size": 64}).override({"lr": 0.2}).validation_size == 64


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_survive_json(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_recipe_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('method = "el"\ntau = 0.5\nimage_sizes = [[0, 32]]\nvalidation_size = 32\n')
    assert load_recipe(str(file)) == Recipe(method="el", tau=0.5, image_sizes=((0, 32),), validation_size=32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1", "unknown key 'learning_rate'; known are"),
        ("lr = 'fast'", "lr must be from"),
        ("epochs = 0", "epochs must be a whole number from 1"),
        ("tau = -1.0", "tau must be from 0"),
        ("seed = -1", "seed must be a whole number from 0"),
        ("epochs = 2.5", "epochs must be a whole number from 1"),
        ("parts = 0", "parts must be a whole number >= 1"),
        ("schedule = 'sine'", "schedule must be one of step, linear, cosine"),
        ("image_sizes = [[1, 32]]", "must start at epoch 0"),
        ("lr = ", "not valid TOML"),
    ],
)
def test_bad_recipes_are_explained(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(str(file))


def test_a_recipe_survives_its_toml_file(tmp_path: Path) -> None:
    recipe = Recipe(
        method="pack.mod:Class", concepts='a "quoted" \\ path é.csv', reference={"Bird, small": 0.25, "Dog": 1e-9},
        q_warmup_divisor="auto", image_sizes=((0, 32), (4, 48)), lr=1e-05, parts=2, compile=True,
    )  # fmt: skip
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), "utf-8")
    assert load_recipe(str(tmp_path / "recipe.toml")) == recipe


def test_shipped_recipes_are_these() -> None:
    assert shipped_recipes() == ["imagenet-fast", "imagenet-paper", "tiny-imagenet", "tiny-imagenet-fast"]


def test_imagenet_paper_is_the_papers() -> None:
    recipe = load_recipe("imagenet-paper")
    assert recipe == Recipe()
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.milestones) == (90, 256, 0.1, (30, 60))
    assert (recipe.weight_decay, recipe.momentum) == (1e-4, 0.9)
    assert (recipe.q_warmup_steps, recipe.q_warmup_divisor, recipe.concepts) == (1000, 10, "imagenet11")
    assert (recipe.inner, recipe.method, recipe.image_sizes) == ("full", "hrrl", ((0, 224),))


@pytest.mark.parametrize(
    "line",
    [
        "method = 5", "method = []", "concepts = 0", "concepts = true", "concepts = []", "reference = 5",
        "reference = {a = 'x'}", "reference = {a = {b = 1}}", "milestones = 'abc'", "milestones = [1.9]",
        "milestones = [-1]", "image_sizes = 5", "image_sizes = [[0, inf]]", "image_sizes = [[0, 32.7]]",
        "image_sizes = [[0, 1000000]]", "validation_size = 'abc'", "crop_pct = true", "parts = true", "cache_px = 1",
        "tau = nan", "q_warmup_divisor = 'much'", "compile = 1", "epochs = 2024-01-01", "nothing = 1",
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_said_with_its_key_and_file(tmp_path: Path, line: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(line)
    with pytest.raises(InputError, match=rf"^config={file}: .*{line.split(' ', maxsplit=1)[0]}"):
        load_recipe(str(file))


@pytest.mark.parametrize("text", ["lr = " + "1" * 5000, "reference = " + "[" * 5000, "lr = ", "\x00"])
def test_what_is_no_toml_is_said(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=f"^config={file}: not valid TOML"):
        load_recipe(str(file))


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("\ufeffepochs = 3\n", "utf-8")
    assert load_recipe(str(tmp_path / "mine.toml")).epochs == 3


def test_a_value_out_of_range_names_the_parameter() -> None:
    with pytest.raises(InputError, match=r"^batch_size=0: must be a whole number from 2 to 1e\+06$"):
        Recipe(batch_size=0)
    with pytest.raises(InputError, match=r"^schedule='sine': must be one of step, linear, cosine$"):
        Recipe().override({"schedule": "sine"})


REMOVED = {"nesterov": False, "tau_ramp_epochs": 0, "q_steps": "decaying", "group_rate": 0.01, "batch_norm": "batch"}


def test_a_recipe_of_an_earlier_version_is_read_where_its_removed_keys_have_their_defaults() -> None:
    assert Recipe.from_dict({**Recipe(lr=0.3).to_dict(), **REMOVED, "tau_ramp_epochs": 0.0}) == Recipe(lr=0.3)
    assert not set(REMOVED) & set(Recipe().to_dict())


def test_images_of_earlier_recipes_are_decoded_as_they_were(tmp_path: Path) -> None:
    """Version 1 of the preprocessing contract drops the alpha."""
    made, before = Recipe(lr=0.3), Recipe(lr=0.3).to_dict()
    assert made.preprocessing().version == before.pop("preprocessing_version") == 2
    earlier = Recipe.from_dict(before)
    assert earlier == made.replace(preprocessing_version=1)
    assert earlier.preprocessing() == Preprocessing(224, 0.875, version=1)
    (tmp_path / "new.toml").write_text("lr = 0.3\n")
    assert load_recipe(str(tmp_path / "new.toml")) == made


@pytest.mark.parametrize(
    ("name", "value"),
    [("nesterov", True), ("tau_ramp_epochs", 2), ("q_steps", "averaged"), ("group_rate", 0.1), ("batch_norm", "sync")],
)
def test_a_removed_key_with_another_value_is_refused(tmp_path: Path, name: str, value: object) -> None:
    expected = rf"{name}={value!r}: is no longer supported; expected {REMOVED[name]!r}, or no {name}$"
    with pytest.raises(InputError, match=f"^{expected}"):
        Recipe.from_dict({name: value})
    file = tmp_path / "mine.toml"
    file.write_text(f"{name} = {str(value).lower() if isinstance(value, bool | int | float) else repr(value)}\n")
    with pytest.raises(InputError, match=rf"^config={file}: {name} is no longer supported; .*got {value!r}$"):
        load_recipe(str(file))


def test_a_start_brings_its_network_unless_one_is_named() -> None:
    shipped = load_recipe("tiny-imagenet-fast")
    assert shipped.network == "resnet18"
    assert shipped.override({"init": "model/"}).network == "auto"
    assert shipped.override({"init": "model/", "network": "resnet18"}).network == "resnet18"
    other = shipped.override({"network": "timm:test_resnet"})
    assert other.override({"init": "model/"}).network == "timm:test_resnet"
    assert shipped.override({"lr": 0.1}).network == "resnet18"
    started = shipped.replace(init="run/", network="resnet18")
    assert started.override({"init": "other/"}).network == "resnet18"
