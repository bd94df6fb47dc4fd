"""`elastic-batch recipes` and `schema`."""

from __future__ import annotations

import json

import pytest

from elastic_batch.cli.main import main
from elastic_batch.job.yaml_text import parse_yaml
from elastic_batch.workloads.recipe_book import recipe_names


def test_all_recipes_are_listed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"], {}) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipe_names())


def test_recipes_are_listed_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"], {}) == 0
    assert sorted(json.loads(capsys.readouterr().out)) == recipe_names()


def test_a_recipes_file_is_shown_to_start_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--show", "digits"], {}) == 0
    assert parse_yaml(capsys.readouterr().out, "shown")["name"] == "digits"


def test_the_schema_is_json_schema_of_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"], {}) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["title"] == "Job"
    assert {"data", "model", "optimizer", "schedule", "micro_batch_size"} <= set(schema["required"])
