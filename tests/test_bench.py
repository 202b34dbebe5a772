"""The tables of the README are made by commands that measure what they say."""

import json

import pytest
from conftest import write_rows
from test_commands import FAST, call, said  # noqa: F401


def test_each_task_beside_its_baselines(capfd, said):  # noqa: F811
    rows = call(capfd, "bench", "glue", **said | {"task": "sst2,stsb"}, **FAST)["rows"]
    assert [(row["task"], row["metric"]) for row in rows] == [("sst2", "accuracy"), ("stsb", "pearson")]
    assert rows[0]["bytes"]["all"] > rows[0]["bytes"]["default"] and rows[0]["extract_seconds"] > 0
    assert call(capfd, "bench", "glue", **said, **FAST)["rows"][0]["extract_seconds"] is None  # a hit


def test_variants_are_compared_on_training_data_alone(capfd, said, tmp_path):  # noqa: F811
    """Other validation labels, the same table."""
    options = said | {"seeds": 2, "only": "linear probe,default,hidden 64"} | FAST
    rows = call(capfd, "bench", "recipes", **options)["rows"]
    assert [row["variant"] for row in rows] == ["linear probe", "default", "hidden 64"]
    assert all(len(row["scores"]["sst2"]) == 2 and row["mean"] > 0.5 for row in rows)
    assert rows[1]["scores"] != rows[2]["scores"]
    for split in ("train", "validation"):
        lines = (said["data"] / "sst2" / f"{split}.jsonl").read_text().splitlines()
        flip = split == "validation"
        write_rows(
            tmp_path / "other" / "sst2" / f"{split}.jsonl",
            [row | {"label": 1 - row["label"] if flip else row["label"]} for row in map(json.loads, lines)],
        )
    assert call(capfd, "bench", "recipes", **options | {"data": tmp_path / "other"})["rows"] == rows


@pytest.mark.parametrize(("words", "error"), [(["recipe"], "unknown bench 'recipe'; known: glue, recipes")])
def test_what_is_not_there_is_answered_with_what_is(capfd, said, words, error):  # noqa: F811
    assert error in call(capfd, "bench", *words, **said, status=2)["error"]
    assert "unknown task 'sst3'" in call(capfd, "bench", "recipes", **said | {"task": "sst3"}, status=2)["error"]
    some = call(capfd, "bench", "recipes", **said, **FAST, seeds=1, only="default,blocks 4-6,verbalizer")
    assert [row["variant"] for row in some["rows"]] == ["default"]
    assert "layer 4" in some["left_out"]["blocks 4-6"] and "output embedding" in some["left_out"]["verbalizer"]
    wrong = call(capfd, "bench", "recipes", **said, only="default,hiden 64", status=2)["error"]
    assert "unknown variant 'hiden 64'; known: linear probe, default" in wrong
