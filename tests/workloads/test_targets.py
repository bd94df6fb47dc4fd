"""Users' own code named in a job file."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_batch.errors import InvalidSetting, UnknownName
from elastic_batch.workloads.targets import call_target, load_target


def test_a_target_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models_of_test.py").write_text(
        "class Zoo:\n    @staticmethod\n    def make(width): return width * 2\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert call_target("model.target", "my_models_of_test:Zoo.make", {"width": 3}) == 6


def test_a_module_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(InvalidSetting, match=r"model\.target = 'no_such:thing': module no_such cannot be imported"):
        load_target("model.target", "no_such:thing")


def test_an_unknown_attribute_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'OrderedDict'"):
        load_target("model.target", "collections:OrderdDict")


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"model\.args = \{'colour': 1\}: Fraction refuses them"):
        call_target("model.target", "fractions:Fraction", {"colour": 1})


def test_what_cannot_be_called_is_no_target() -> None:
    with pytest.raises(InvalidSetting, match="must name a function or a class; it is a float"):
        call_target("model.target", "math:pi", {})


def test_an_error_inside_a_target_is_not_laid_on_arguments_that_were_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_errors_of_test.py").write_text("def make(width=1): return len(width)\ndef need(width): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TypeError, match="has no len"):
        call_target("model.target", "my_errors_of_test:make", {})
    with pytest.raises(InvalidSetting, match=r"make refuses them: .*has no len"):
        call_target("model.target", "my_errors_of_test:make", {"width": 2})
    with pytest.raises(InvalidSetting, match="need refuses them: missing a required argument: 'width'"):
        call_target("model.target", "my_errors_of_test:need", {})
