"""The job files in docs/jobs.md are read by the program."""

from __future__ import annotations

import re
from pathlib import Path

from elastic_batch.job import Job
from elastic_batch.job.yaml_text import parse_yaml
from elastic_batch.workloads.planning import plan_job

PAGE = (Path(__file__).parents[1] / "docs" / "jobs.md").read_text(encoding="utf-8")
BLOCKS = [parse_yaml(block, "docs/jobs.md") for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


def test_the_smallest_job_is_planned() -> None:
    assert plan_job(Job.parse(BLOCKS[0])).plan.updates < plan_job(Job.parse(BLOCKS[0])).plan.baseline_updates


def test_the_sections_with_targets_fit_into_a_job() -> None:
    job = Job.parse({**BLOCKS[0], **BLOCKS[1]})
    assert job.optimizer.adaptive
    assert job.data.num_samples == 120_000


def test_every_field_of_a_job_is_on_the_page() -> None:
    missing = [name for name in Job.model_fields if f"`{name}`" not in PAGE]
    assert missing == []
