"""The `schedule` section of a job file: one model per strategy, told apart by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from elastic_batch.schedule import AnySchedule, MilestoneSchedule, ScheduleContext

ADAPTER: TypeAdapter[Any] = TypeAdapter(AnySchedule)
EXAMPLES: list[dict[str, Any]] = [
    {"strategy": "decay-lr", "milestones": ["60ep"], "factor": 5},
    {"strategy": "grow-batch", "milestones": ["60ep", "0.7dur"], "factor": [5, 2], "raised": {"learning_rate": 0.2}},
    {"strategy": "hybrid", "milestones": ["60ep", "120ep"], "factor": 5, "num_growths": 2, "warmup": "5ep"},
    {"strategy": "convert", "shape": "cosine", "warmup": {"duration": "5ep", "start_factor": 0.0}},
    {"strategy": "convert", "shape": {"name": "step", "every": "30ep", "gamma": 0.1}, "growth_only": True},
    {"strategy": "ramp", "points": "100ep:640"},
    {"strategy": "steps", "points": "50ep:640 100ep:1280"},
    {"strategy": "adaptive", "decisions": [[1_000_000, 640]]},
]
CONTEXT = ScheduleContext(num_samples=50_000, micro_batch_size=128, learning_rate=0.1, momentum=0.9)


def _complete(example: dict[str, Any]) -> dict[str, Any]:
    return {"global_batch_size": 128, "max_duration": "200ep", **example}


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_section_survives_being_written_and_read(example: dict[str, Any]) -> None:
    spec = ADAPTER.validate_python(_complete(example))
    again = ADAPTER.validate_python(spec.model_dump(mode="json"))
    assert again == spec
    assert ADAPTER.validate_json(spec.model_dump_json()) == spec
    assert again.build(CONTEXT) == spec.build(CONTEXT)


@pytest.mark.parametrize("strategy", ["decay-lr", "grow-batch", "hybrid"])
def test_the_papers_strategies_can_be_swapped_in_one_job(strategy: str) -> None:
    fields = _complete({"milestones": ["60ep"], "factor": 5, "strategy": strategy, "num_growths": 1})
    spec = ADAPTER.validate_python(fields)
    assert isinstance(spec, MilestoneSchedule)
    assert spec.strategy == strategy


def test_a_specification_cannot_be_changed() -> None:
    spec = ADAPTER.validate_python(_complete(EXAMPLES[0]))
    with pytest.raises(ValidationError, match="frozen"):
        spec.global_batch_size = 256


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strategy": "grow", "milestones": [], "factor": 2}, "'decay-lr', 'grow-batch', 'hybrid'"),
        ({"strategy": "grow-batch", "milestones": [], "factor": 2, "gama": 1}, "Extra inputs"),
        ({"strategy": "grow-batch", "milestones": []}, "Field required"),
    ],
)
def test_unknown_strategies_and_fields_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ADAPTER.validate_python(_complete(fields))


def test_the_json_schema_describes_every_field() -> None:
    schema = ADAPTER.json_schema()
    assert set(schema["discriminator"]["mapping"]) == {
        "decay-lr", "grow-batch", "hybrid", "convert", "ramp", "steps", "adaptive"
    }  # fmt: skip
    for name, definition in schema["$defs"].items():
        for field, described in definition.get("properties", {}).items():
            assert "description" in described or field in ("name", "strategy"), (name, field)


def test_the_json_schema_allows_the_short_forms() -> None:
    definitions = ADAPTER.json_schema()["$defs"]
    for model, field in (("StepsSchedule", "points"), ("RampSchedule", "points"), ("MilestoneSchedule", "warmup")):
        kinds = definitions[model]["properties"][field]["anyOf"]
        assert {"type": "string"} in kinds, (model, field)


def test_the_json_schema_lists_the_shapes() -> None:
    shape = ADAPTER.json_schema()["$defs"]["ConvertSchedule"]["properties"]["shape"]
    names, models = shape["anyOf"]
    assert names["enum"] == ["constant", "cosine", "linear"]
    assert len(models["oneOf"]) == 11
