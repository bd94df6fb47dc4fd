"""The JSON Schema of a job file, for editors and validators."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from elastic_batch.job.job import Job
from elastic_batch.schedule import Duration


class _JobSchema(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Duration) else super().encode_default(dft)


def job_schema() -> dict[str, Any]:
    """Describe every field of a job file, with its default as one would write it."""
    return Job.model_json_schema(schema_generator=_JobSchema)
