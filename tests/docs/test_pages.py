"""README and docs/: links lead somewhere, lists are complete, code runs, figures that can be computed are right."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from elastic_batch.job import load_job
from elastic_batch.trainer import TrainerOptions
from elastic_batch.workloads.planning import plan_job
from elastic_batch.workloads.recipe_book import find_job_file

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("d*/README.md")])
IGNORED = {"__pycache__"}


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name}: {target}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    assert [page.name for page in ROOT.glob("docs/*.md") if f"({page.name})" not in index] == ["README.md"]


def test_the_index_of_decisions_has_each_with_its_title_in_order() -> None:
    files = sorted(ROOT.glob("docs/decisions/0*.md"))
    index = (ROOT / "docs/decisions/README.md").read_text()
    titles = [file.read_text().splitlines()[0].removeprefix("# ") for file in files]
    wanted = [f"- [{title}]({file.name})" for title, file in zip(titles, files, strict=True)]
    assert re.findall(r"^- .*$", index, re.M) == wanted


def _listed() -> list[str]:
    """The paths in the README's file tree."""
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", readme, re.S)
    assert tree is not None
    paths, folder = [], ""
    for line in tree[1].splitlines():
        if line.startswith("  "):
            paths.append(folder + line.split()[0])
            continue
        names = re.match(r"\S+(?:  ?\S+\.md|  ?LICENSE|  ?docker/)*", line)
        assert names is not None
        paths += names[0].split()
        folder = paths[-1]
    return paths


def test_every_path_in_the_file_tree_exists() -> None:
    assert [path for path in _listed() if not (ROOT / path).exists()] == []


def test_the_file_tree_has_all_of_the_package() -> None:
    listed = {path.rstrip("/") for path in _listed()}
    inside = {f"elastic_batch/{path.name}" for path in (ROOT / "elastic_batch").iterdir() if path.name not in IGNORED}
    assert sorted(inside - listed) == []


def test_the_readme_counts_the_updates_that_the_recipes_plan() -> None:
    rows = re.findall(r"^\| `(cifar10-[\w-]+)` \| ([\d ]+) \| ([\d ]+) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 4
    for name, updates, baseline in rows:
        found = plan_job(load_job(find_job_file(name), environ={})).plan
        assert (found.updates, found.baseline_updates) == (_number(updates), _number(baseline))


def _number(text: str) -> int:
    return int(text.replace(" ", ""))


def test_the_code_of_the_page_on_training_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.S)
    names: dict[str, Any] = {}
    for text in blocks:
        exec(text, names)  # the page's own text
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("(1632, 1632, False, {'averaged accuracy': 0.")
    assert second.startswith("(5760, 5760, True, {'averaged accuracy': 0.9")


def test_the_page_on_training_has_every_option() -> None:
    table = re.search(r"## Options\n(.*?)\n## ", (ROOT / "docs/training.md").read_text(), re.S)
    assert table is not None
    listed = {name for row in re.findall(r"^\| (`.*?) \|", table[1], re.M) for name in re.findall(r"`(\w+)`", row)}
    own = {field.name for field in dataclasses.fields(TrainerOptions)}
    assert listed == own | {"loss_fn", "membership"}
