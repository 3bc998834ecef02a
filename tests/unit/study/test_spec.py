"""A study file is refused before anything runs, in a few lines that name what to do."""

from __future__ import annotations

import pytest
import yaml

from lit_modules.complaints import explain
from study.spec import Arm, Endpoint, read

DEPTH = {"model": {"init_args": {"plugins": {"depth": {"class_path": "ProgressiveDepths"}}}}}
GOOD = {
    "folder": "runs/studies/x",
    "base": "base.yaml",
    "levels": {0.75: None, "half": {"a": 1}},
    "arms": {"dense": None, "p_mod": {"set": DEPTH, "levels": [0.75, "half"]}, "b": {"levels": {0.2: None}}},
    "reference": "dense",
    "endpoint": {"contrast": ["p_mod", "b"]},
}


@pytest.fixture
def parse(tmp_path):
    def parse(given):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(given))
        return read(tmp_path / "study.yaml", explain)

    return parse


def test_a_file_is_read_with_its_defaults(parse):
    study = parse(GOOD)
    assert study.arms["dense"] == Arm() and study.arms["p_mod"].levels == ["0.75", "half"]
    assert study.arms["b"].levels == {"0.2": {}} and study.levels == {"0.75": {}, "half": {"a": 1}}
    assert study.endpoint == Endpoint(("p_mod", "b"), "macro")
    assert study.seeds == [0, 1, 2, 3, 4] and study.margin == 0.01 and study.parent is None


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ({"sede": [1]}, ["'sede' is not a key", "Did you mean 'seeds'?"]),
        ({"seeds": ["one"]}, ["seeds: 'one' is not allowed", "int"]),
        ({"seeds": [1, 1]}, ["seeds: [1, 1]", "different"]),
        ({"seeds": []}, ["at least one"]),
        ({"arms": {**GOOD["arms"], "b": {"lvels": []}}}, ["arms.b: 'lvels'", "Did you mean 'levels'?"]),
        ({"arms": {**GOOD["arms"], "b": {"fit": "maybe"}}}, ["arms.b.fit: 'maybe' is not allowed", "bool"]),
        ({"arms": {**GOOD["arms"], "b": {"levels": ["haf"]}}}, ["arms.b.levels: 'haf'", "Did you mean 'half'?"]),
        ({"arms": {**GOOD["arms"], "b": {"levels": 3}}}, ["arms.b.levels: 3 is not allowed"]),
        ({"arms": {**GOOD["arms"], "b": 3}}, ["arms.b: 3 is not allowed"]),
        ({"arms": {**GOOD["arms"], "b/c": None}}, ["'b/c' is to name a folder"]),
        ({"arms": {**GOOD["arms"], "parent": None}}, ["'parent' is to name a folder"]),
        ({"arms": {**GOOD["arms"], "b": {"set": {"seed_everything": 3}}}}, ["b.set has seed_everything", "`seeds`"]),
        ({"reference": "p_mod"}, ["reference: p_mod has levels 0.75, half"]),
        ({"reference": "dnse"}, ["reference: 'dnse' is not an arm", "Did you mean 'dense'?"]),
        ({"endpoint": {"metric": "macro"}}, ["endpoint.contrast: missing"]),
        ({"endpoint": {"contrast": ["p_mod", "q"]}}, ["endpoint.contrast: 'q' is not an arm"]),
        ({"endpoint": {"contrast": ["p_mod"]}}, ["endpoint.contrast", "2 elements"]),
        ({"contrasts": [["p_mod", "q"]]}, ["contrasts: 'q' is not an arm"]),
        ({"parent": {"st": {}}}, ["parent: 'st' is not a key", "Did you mean 'set'?"]),
        ({"set": {"trainer": {"logger": False}}}, ["set has seed_everything or trainer.logger"]),
        ({"margin": 1.5}, ["margin: 1.5"]),
        ({"jobs": 0}, ["jobs: 0"]),
        ({"base": None}, ["base: missing"]),
    ],
)
def test_mistakes_are_named(parse, mistake, said):
    with pytest.raises(ValueError) as error:
        parse({**GOOD, **mistake})
    text = str(error.value)
    assert all(part in text for part in said), text
    assert len(text.splitlines()) <= 4


def test_what_is_no_yaml_is_said_so(tmp_path):
    (tmp_path / "study.yaml").write_text("[1")
    with pytest.raises(ValueError, match="is no YAML"):
        read(tmp_path / "study.yaml")
    with pytest.raises(ValueError, match="There is no file"):
        read(tmp_path / "other.yaml")
