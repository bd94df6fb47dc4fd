"""The job file: a typed model, one loader, and what of it decides the trajectory."""

from __future__ import annotations

from elastic_batch.job.job import TRAJECTORY, Job
from elastic_batch.job.json_schema import job_schema
from elastic_batch.job.loading import load_job, parse_assignments, resolve_job
from elastic_batch.job.settings import (
    AdamSettings,
    AdamWSettings,
    DataSettings,
    EvaluationSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    Section,
    SGDSettings,
    TargetOptimizerSettings,
)
from elastic_batch.job.yaml_text import format_yaml, parse_yaml

__all__ = [
    "TRAJECTORY",
    "AdamSettings",
    "AdamWSettings",
    "DataSettings",
    "EvaluationSettings",
    "Job",
    "LossSettings",
    "ModelSettings",
    "OptimizerSettings",
    "SGDSettings",
    "Section",
    "TargetOptimizerSettings",
    "format_yaml",
    "job_schema",
    "load_job",
    "parse_assignments",
    "parse_yaml",
    "resolve_job",
]
