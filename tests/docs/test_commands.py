"""Command lines in README and docs/: those that only show something run, and the others are ones that could."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from elastic_batch.cli.main import main, root

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
RUN = {"plan", "recipes", "schema"}
_PLACEHOLDER = re.compile(r"[A-Z]{2,}|\.\.\.|\|")


def _shown() -> list[str]:
    """Every whole command line of ours, once: lines of blocks without their comments, and words within sentences."""
    lines = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```\w*\n(.*?)```", text, re.S):
            lines += re.findall(r"^(?:torchrun .*-m elastic_batch|elastic-batch) (.*?)(?:\s+#.*)?$", block, re.M)
        sentences = re.sub(r"```.*?```", "", text, flags=re.S)
        lines += [" ".join(words.split()) for words in re.findall(r"`elastic-batch ([^`]*)`", sentences)]
    return sorted({line for line in lines if len(line.split()) > 1 or line in ("recipes", "schema")})


def _can_run(line: str) -> bool:
    # Measuring takes ten seconds, and is tested with the command.
    return line.split()[0] in RUN and "--measure" not in line and not _PLACEHOLDER.search(line.partition(" > ")[0])


LINES = _shown()


def test_the_lines_are_found() -> None:
    assert "plan cifar10-wrn16-4-grow-batch --workers 1,8,40" in LINES
    assert len([line for line in LINES if _can_run(line)]) >= 10


@pytest.mark.parametrize("line", [line for line in LINES if _can_run(line)])
def test_what_only_shows_something_runs(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["recipes", "--show", "digits"], environ={}) == 0
    Path("my-job.yaml").write_text(capsys.readouterr().out)
    command, _, _ = line.partition(" > ")  # where it goes
    assert main(shlex.split(command), environ={}) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in LINES if not _can_run(line)])
def test_the_options_of_the_others_exist(line: str) -> None:
    words = shlex.split(line.replace("[", "").replace("]", ""))
    command: click.Command = root
    with click.Context(root) as context:
        while isinstance(command, click.Group):
            found = command.get_command(context, words.pop(0))
            assert found is not None, line
            command = found
    known = {flag for option in command.params for flag in option.opts} | {"--help", "-h"}
    for word in words:
        if word.endswith(".py"):
            break  # what follows is the script's
        assert not word.startswith("-") or word.partition("=")[0] in known, word
