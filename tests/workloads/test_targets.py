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
