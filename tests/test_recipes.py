import pytest
import yaml

from carina.errors import CarinaError
from carina.pretrain.recipe import PretrainRecipe
from carina.recipes import build, differences, parse_overrides, read_recipe, to_yaml


def test_words_are_words_and_numbers_are_numbers():
    given = parse_overrides(
        ["a=no", "b=off", "c=true", "d=1e-4", "e=3", "f=0.5", "g=-1", "h=1.5e3", "i=null", "j=v1.2"]
    )
    assert given == {
        "a": "no",
        "b": "off",
        "c": True,
        "d": 1e-4,
        "e": 3,
        "f": 0.5,
        "g": -1,
        "h": 1500.0,
        "i": None,
        "j": "v1.2",
    }
    assert isinstance(given["e"], int)


def test_overrides_are_yaml_with_dotted_keys():
    given = parse_overrides(["optim.lr=1e-4", "scales=[128,256]", "where=view == 'PA' and age >= 18", "steps=null"])
    assert given == {"optim": {"lr": 1e-4}, "scales": [128, 256], "where": "view == 'PA' and age >= 18", "steps": None}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lrr=1", r"'optim.lrr' is not a key here \(did you mean 'optim.lr'\?\)"),
        ("batchsize=8", r"'batchsize' is not a key here \(did you mean 'batch_size'\?\)"),
        ("batch_size=many", r"batch_size: .*integer.*\(given: 'many'\)"),
        ("optim.name=adam", r"optim.name: .*'sgd', 'adamw' or 'lars'"),
        ("pretexts.moco.temperature=0", r"pretexts.moco.temperature: .*greater than 0"),
        ("optim", "not of the form key=value"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_nearest_key(word, message):
    with pytest.raises(CarinaError, match=message) as caught:
        build("pretrain", PretrainRecipe, "debug/moco", [word])
    assert "\n" not in str(caught.value)


def test_the_resolved_recipe_says_everything_and_builds_itself(tmp_path):
    recipe = build("pretrain", PretrainRecipe, "moco_resnet50", ["seed=4"])
    (tmp_path / "mine.yaml").write_text(to_yaml(recipe))
    again = build("pretrain", PretrainRecipe, str(tmp_path / "mine.yaml"), [])
    assert again == recipe
    assert set(yaml.safe_load(to_yaml(recipe))) == set(read_recipe("pretrain", "default"))


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(CarinaError, match=r"no recipe 'moco_resnet5'.*did you mean 'moco_resnet50'"):
        read_recipe("pretrain", "moco_resnet5")


def test_a_recipe_that_is_not_yaml_names_the_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("seed: 1\nscales: [1, 2\n")
    with pytest.raises(CarinaError, match="not valid YAML at line"):
        read_recipe("pretrain", str(tmp_path / "bad.yaml"))


def test_differences_are_dotted():
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5, "d": 3}, "e": 0}) == ["b.c", "e"]


def test_a_value_that_reads_as_a_comment_is_refused():
    with pytest.raises(CarinaError, match="reads as a comment"):
        parse_overrides([r"patient_regex=#(\d+)"])
    assert parse_overrides([r"patient_regex='#(\d+)'", "age=null"]) == {"patient_regex": r"#(\d+)", "age": None}
