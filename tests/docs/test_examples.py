"""The examples run, and the documentation shows what is in them."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(180)  # seven scripts that load four trainers, on a busy machine

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = ("cosine_before", "cosine", "multistep_before", "multistep")
INTEGRATIONS = ("accelerate_loop", "lightning_module", "hf_trainer")

# One process for all: loading torch, scikit-learn and the other trainers takes longer than training.
_RUN_ALL = """
import runpy, sys, traceback
for path in sys.argv[1:]:
    print("##", path)
    try:
        runpy.run_path(path, run_name="__main__")
    except BaseException:
        traceback.print_exc(file=sys.stdout)
"""


@pytest.fixture(scope="module")
def last_lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Script -> the last line that it prints, run on one thread."""
    paths = [EXAMPLES / f"{name}.py" for name in SCRIPTS]
    paths += [EXAMPLES / "integrations" / f"{name}.py" for name in INTEGRATIONS]
    folders = os.pathsep.join(map(str, (ROOT, EXAMPLES, EXAMPLES / "integrations")))
    done = subprocess.run(
        [sys.executable, "-c", _RUN_ALL, *map(str, paths)],
        cwd=tmp_path_factory.mktemp("examples"),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    _, *parts = re.split(r"^## .*?(\w+)\.py\n", done.stdout, flags=re.M)
    return {name: text.splitlines()[-1] for name, text in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize(("name", "updates"), [("cosine", 600), ("multistep", 540)])
def test_the_script_is_as_good_after_the_change_as_before_with_fewer_updates(
    last_lines: dict[str, str], name: str, updates: int
) -> None:
    before, after = (float(last_lines[key].split()[-1]) for key in (f"{name}_before", name))
    assert last_lines[name].startswith(f"epoch 19, update {updates}:")
    assert before >= 0.97
    assert abs(after - before) <= 0.01
    assert f"{updates} updates" in " ".join(_readme().split())


def _readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def _versions(name: str) -> tuple[list[str], list[str]]:
    before, after = (EXAMPLES / f"{name}_before.py", EXAMPLES / f"{name}.py")
    return before.read_text().splitlines(), after.read_text().splitlines()


@pytest.mark.parametrize("name", ["cosine", "multistep"])
def test_at_most_ten_lines_change(name: str) -> None:
    matcher = difflib.SequenceMatcher(None, *_versions(name), autojunk=False)
    changed = [(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"]
    # A line that another one replaces counts once.
    assert sum(max(removed, added) for removed, added in changed) <= 10
    assert sum(removed for removed, _ in changed) <= 10
    assert sum(added for _, added in changed) <= 10


@pytest.mark.parametrize("name", ["cosine", "multistep"])
def test_the_readme_shows_exactly_the_change(name: str) -> None:
    names = f"examples/{name}_before.py", f"examples/{name}.py"
    shown = "\n".join(difflib.unified_diff(*_versions(name), *names, n=1, lineterm=""))
    assert f"```diff\n{shown}\n```" in _readme()


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_other_trainers_follow_the_schedule_to_the_same_loss(
    last_lines: dict[str, str], name: str, own_line: str
) -> None:
    assert last_lines[name] == own_line


@pytest.fixture(scope="module")
def own_line() -> str:
    """What our trainer ends with, trained like the examples with other trainers."""
    import torch
    from sklearn.datasets import load_digits
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset

    from elastic_batch import Trainer
    from elastic_batch.schedule import MilestoneSchedule

    pixels, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(targets)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = MilestoneSchedule.of(
        strategy="grow-batch", global_batch_size=32, max_duration="10ep", milestones=["5ep", "7ep", "9ep"], factor=2
    )
    with Trainer(model, optimizer, TensorDataset(images, labels), schedule, micro_batch_size=16) as trainer:
        for update in trainer.updates():
            for batch in update:
                update.backward(F.cross_entropy(model(batch[0]), batch[1]))
            update.step()
        loss = F.cross_entropy(model(images), labels).item()
        return f"{trainer.num_updates} updates, training loss {loss:.6f}"


@pytest.mark.parametrize("text", re.findall(r"```python\n(.*?)```", (ROOT / "docs/integrations.md").read_text(), re.S))
def test_the_page_on_other_trainers_shows_what_is_in_the_examples(text: str) -> None:
    assert any(text in path.read_text() for path in (EXAMPLES / "integrations").glob("*.py"))
