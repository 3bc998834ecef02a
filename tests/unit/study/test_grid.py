"""One nested config for each run, and a hash that says when a finished run is another one's."""

from __future__ import annotations

import json

import pytest
import yaml

from study.grid import runs_of
from study.merge import differences, merged
from study.spec import read

PLUGIN = {"class_path": "ProgressiveDepths", "init_args": {"capacity": {"class_path": "ShiftedCosine"}}}


def test_later_values_win_and_a_new_class_starts_with_its_own_arguments():
    below = {"a": {"class_path": "One", "init_args": {"x": 1, "y": {"z": 2}}}, "b": [1, 2], "c": 1}
    assert merged(below, {"a": {"init_args": {"y": {"w": 3}}}, "b": [3]}) == {
        "a": {"class_path": "One", "init_args": {"x": 1, "y": {"z": 2, "w": 3}}},
        "b": [3],
        "c": 1,
    }
    assert merged(below, {"a": {"class_path": "Two", "init_args": {"v": 1}}})["a"] == {
        "class_path": "Two",
        "init_args": {"v": 1},
    }
    assert merged(below, {"a": {"class_path": "package.One"}})["a"]["init_args"]["x"] == 1
    assert merged({"a": "One"}, {"a": {"init_args": {"x": 1}}})["a"] == {"class_path": "One", "init_args": {"x": 1}}
    assert merged({"m": {"init_args": {"x": 1}}}, {"m": {"class_path": "M"}})["m"]["init_args"] == {"x": 1}
    assert below == {"a": {"class_path": "One", "init_args": {"x": 1, "y": {"z": 2}}}, "b": [1, 2], "c": 1}


def test_differences_name_every_value():
    found = differences({"a": {"b": 1, "c": [1]}, "d": 0}, {"a": {"b": 2, "c": [1]}, "e": None})
    assert found == ["a.b was 1, now 2", "d was 0, now None"]


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "base.yaml").write_text("trainer: {max_steps: 9, lr: 1e-3}\nmodel: {init_args: {width: 4}}\n")

    def runs(**more):
        given = {
            "folder": str(tmp_path / "study"),
            "base": "base.yaml",
            "seeds": [3, 4],
            "parent": {"set": {"trainer": {"max_steps": 90}}},
            "levels": {"low": {"model": {"init_args": {"width": 5}}}},
            "arms": {
                "dense": None,
                "p_mod": {
                    "set": {"model": {"init_args": {"plugins": {"depth": PLUGIN}}}},
                    "levels": {"low": {"trainer": {"max_steps": 7}}, "high": None},
                },
                "untrained": {"fit": False},
            },
            "reference": "dense",
            "endpoint": {"contrast": ["p_mod", "dense"]},
            **more,
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
        return runs_of(read(tmp_path / "study.yaml"), tmp_path)

    return runs


def test_the_grid_is_arms_by_levels_by_seeds_parents_first(runs):
    names = [run.name for run in runs()]
    assert names == ["parent/seed_3", "parent/seed_4"] + [
        f"{cell}/seed_{seed}" for seed in (3, 4) for cell in ("dense", "p_mod/low", "p_mod/high", "untrained")
    ]


def test_layers_are_base_arm_level_and_the_level_of_the_arm(runs):
    found = {run.name: run for run in runs()}
    low, high, dense = (found[f"{cell}/seed_4"].config for cell in ("p_mod/low", "p_mod/high", "dense"))
    assert low["model"]["init_args"]["width"] == 5 and low["trainer"]["max_steps"] == 7
    assert high["model"]["init_args"]["width"] == 4 and high["trainer"]["max_steps"] == 9
    assert low["model"]["init_args"]["plugins"]["depth"] == PLUGIN and "plugins" not in dense["model"]["init_args"]
    assert found["parent/seed_3"].config["trainer"]["max_steps"] == 90
    assert dense["trainer"]["lr"] == 0.001 and dense["seed_everything"] == 4
    assert not {"seed", "init_args"} & set(dense.get("data", {}))  # the data are the same for all seeds


def test_only_the_reference_is_asked_without_the_right_picture(runs):
    for run in runs():
        asked = run.config["model"]["init_args"]["generation"]
        assert asked == dict.fromkeys(("blank_batches", "other_image_batches"), None if run.arm == "dense" else 0)


def test_arms_start_from_the_parent_of_their_seed_unless_they_say_otherwise(runs):
    arms = {"dense": None, "scratch": {"set": {"model": {"init_args": {"start_from": None}}}}}
    found = {run.name: run for run in runs(arms=arms, endpoint={"contrast": ["dense", "scratch"]})}
    start = {name: run.config["model"]["init_args"].get("start_from", "nothing") for name, run in found.items()}
    assert start["dense/seed_4"] == str(found["parent/seed_4"].checkpoint)
    assert start["scratch/seed_4"] is None and start["parent/seed_4"] == "nothing"


def test_a_run_is_made_again_by_commands_that_read_one_file(runs):
    run = next(run for run in runs() if run.cell == "p_mod/low")
    run.write_config()
    assert merged(yaml.safe_load(run.config_file.read_text())) == merged(run.config)
    fit, test = run.commands
    assert fit == f"python -m lit fit --config {run.config_file}"
    assert test == f"python -m lit test --config {run.config_file} --ckpt_path {run.checkpoint}"
    (untrained,) = next(run for run in runs() if run.arm == "untrained").commands
    assert untrained.startswith("python -m lit test") and "ckpt" not in untrained


def test_a_finished_run_keeps_its_config(runs, tmp_path):
    run = runs()[2]
    assert run.finished() is None
    run.write_config()
    run.result.write_text(json.dumps({"hash": run.hash}))
    assert run.finished() == {"hash": run.hash}
    assert {one.hash for one in runs(folder=str(tmp_path / "elsewhere"))} == {one.hash for one in runs()}
    more = runs(arms={"dense": None, "new": None}, endpoint={"contrast": ["dense", "new"]}, seeds=[3, 5])
    assert more[2].finished()  # new arms and seeds change nothing
    changed = runs(arms={"dense": {"set": {"trainer": {"max_steps": 8}}}, "p_mod": None})[2]
    with pytest.raises(ValueError, match=r"trainer.max_steps was 9, now 8(.|\n)*another `folder`, or delete"):
        changed.finished()
    with pytest.raises(ValueError, match="config of its parent changed"):
        runs(parent={"set": {"trainer": {"max_steps": 91}}})[2].finished()
