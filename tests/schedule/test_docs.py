"""The examples of docs/schedules.md and docs/noise-scale.md do what the pages say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from elastic_batch.job.yaml_text import parse_yaml
from elastic_batch.schedule import AnySchedule, ScheduleContext, plan
from elastic_batch.schedule.shapes import AnyShape

DOCS = Path(__file__).parents[2] / "docs"
ADAPTER: TypeAdapter[Any] = TypeAdapter(AnySchedule)


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("text", _blocks("schedules.md", "yaml"))
def test_every_example_of_a_job_can_be_planned(text: str) -> None:
    spec = ADAPTER.validate_python(parse_yaml(text, "docs")["schedule"])
    is_language_model = "tok" in text
    context = ScheduleContext(
        num_samples=10**9 if is_language_model else 50_000,
        micro_batch_size=32,
        learning_rate=3e-4 if is_language_model else 0.1,
        momentum=0.0 if is_language_model else 0.9,
        adaptive_optimizer=is_language_model,
        tokens_per_sample=4096,
    )
    assert plan(spec.build(context)).updates > 0


@pytest.mark.parametrize(("index", "updates"), [(0, 29_142), (1, 2_305)])
def test_the_papers_examples_have_the_updates_that_the_page_tells(index: int, updates: int) -> None:
    text = _blocks("schedules.md", "yaml")[index].replace("warmup", "# warmup")
    spec = ADAPTER.validate_python(parse_yaml(text, "docs")["schedule"])
    context = ScheduleContext(num_samples=50_000, micro_batch_size=128, learning_rate=0.1, momentum=0.9)
    assert plan(spec.build(context)).updates == updates


def test_every_shape_is_in_the_table() -> None:
    listed = re.findall(
        r"`([a-z-]+)`", "".join(re.findall(r"^\| (`[^|]*)\|", (DOCS / "schedules.md").read_text(), re.M))
    )
    shapes = TypeAdapter(AnyShape).json_schema()["$defs"].values()
    assert {shape["properties"]["name"]["const"] for shape in shapes} <= set(listed)


def test_the_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    pure = [text for page in ("schedules.md", "noise-scale.md") for text in _blocks(page, "python") if "import" in text]
    assert len(pure) == 2
    for text in pure:
        names: dict[str, Any] = {}
        exec(text, names)  # the page's own text
        if "estimator" in names:
            assert names["estimator"].noise_scale is None
    assert capsys.readouterr().out.splitlines()[0] == "0 23438 128"
