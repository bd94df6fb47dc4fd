"""The job file: what it accepts, what it refuses and how, precedence, fingerprint, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_batch.errors import InvalidSetting
from elastic_batch.job import Job, format_yaml, job_schema, load_job, parse_assignments, resolve_job
from elastic_batch.job.yaml_text import parse_yaml

SMALLEST: dict[str, Any] = {
    "name": "smallest",
    "data": {"name": "digits"},
    "model": {"name": "small-resnet"},
    "optimizer": {"learning_rate": 0.1, "momentum": 0.9},
    "schedule": {
        "strategy": "grow-batch",
        "global_batch_size": 32,
        "max_duration": "20ep",
        "milestones": ["8ep", "12ep"],
        "factor": 2,
    },
    "micro_batch_size": 32,
}


def refusal(**flags: Any) -> InvalidSetting:
    """What the smallest job is refused with when fields are changed; `__` stands for a dot."""
    with pytest.raises(InvalidSetting) as caught:
        resolve_job(SMALLEST, flags={name.replace("__", "."): value for name, value in flags.items()})
    return caught.value


def test_every_default_is_pinned() -> None:
    assert resolve_job(SMALLEST).dump() == {
        "name": "smallest",
        "seed": 0,
        "data": {
            "name": "digits",
            "target": None,
            "args": {},
            "root": None,
            "download": False,
            "num_samples": None,
            "image_size": None,
            "tokens_per_sample": None,
            "block_size": None,
            "augmentation": {"crop_padding": 0, "horizontal_flip": False, "min_crop_area": None},
        },
        "model": {"name": "small-resnet", "target": None, "args": {}},
        "loss": {
            "name": "cross-entropy",
            "label_smoothing": 0.0,
            "target": None,
            "args": {},
            "takes": "outputs, targets",
        },
        "optimizer": {
            "name": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 0.0,
            "decay_norms_and_biases": True,
        },
        "schedule": {
            "strategy": "grow-batch",
            "global_batch_size": 32,
            "max_global_batch_size": None,
            "max_duration": "20ep",
            "milestones": ["8ep", "12ep"],
            "factor": 2.0,
            "num_growths": 1,
            "noise_form": "linear",
            "rule": "linear",
            "raised": None,
            "warmup": None,
        },
        "micro_batch_size": 32,
        "ghost_batch_size": None,
        "precision": "float32",
        "max_grad_norm": None,
        "momentum_correction": True,
        "on_non_finite": "stop",
        "deterministic": False,
        "compile": False,
        "memory_format": "contiguous",
        "micro_batches_per_pass": "auto",
        "num_workers": 0,
        "num_threads": None,
        "spares": 0,
        "device": "auto",
        "metrics_port": None,
        "loggers": [],
        "checkpoint": {"every": "1ep", "keep": 3, "location": None},
        "evaluation": {"every": "1ep", "batch_size": 500},
    }


def test_a_resolved_job_read_back_from_yaml_is_the_same_job() -> None:
    job = resolve_job(SMALLEST)
    assert Job.parse(parse_yaml(format_yaml(job.dump()), "text")) == job


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("abc019.:-+e~ ", max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1", min_size=1), inner, max_size=3),
        max_leaves=8,
    )
)
def test_whatever_is_written_as_yaml_reads_back_equal(value: Any) -> None:
    assert parse_yaml(format_yaml({"value": value}), "text") == {"value": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("5E6", 5e6), (".5", 0.5), ("-2", -2), ("1.", 1.0), ("no", "no"), ("true", True), ("~", None)]
    + [(word, word) for word in ("12:30", "2024-01-01", "0x10", "1_000", "90ep", "5e6sp", "on")],
)
def test_yaml_scalars_mean_what_a_user_expects(text: str, value: object) -> None:
    assert parse_yaml(f"field: {text}", "text") == {"field": value}


def test_broken_yaml_is_refused_with_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\nmodel: [1, 2\n")
    with pytest.raises(InvalidSetting, match=r"job\.yaml.*line 3, column 1"):
        load_job(path)


def test_broken_yaml_of_a_flag_names_the_flag() -> None:
    with pytest.raises(InvalidSetting, match=r"^--set seed = '\[': is not valid YAML"):
        parse_assignments(("seed=[",))


def test_a_repeated_key_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="'seed' occurs twice"):
        parse_yaml("seed: 1\nseed: 2\n", "text")


@pytest.mark.parametrize("text", ["seed: {{ seed }}", "? [a, b]\n: 1"])
def test_a_key_that_is_no_plain_value_is_refused(text: str) -> None:
    with pytest.raises(InvalidSetting, match=r"line 1, column \d+: a list or a mapping cannot be a field's name"):
        parse_yaml(text, "text")


def test_a_missing_file_and_one_without_fields_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="cannot be read"):
        load_job(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InvalidSetting, match="must be a mapping"):
        load_job(tmp_path / "list.yaml")


def test_json_files_load_too(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(SMALLEST))
    assert load_job(path) == resolve_job(SMALLEST)


def test_flag_wins_over_environment_over_file_over_default() -> None:
    environ = {"ELASTIC_BATCH_SEED": "1", "ELASTIC_BATCH_OPTIMIZER__LEARNING_RATE": "2e-1", "OTHER": "x"}
    job = resolve_job({**SMALLEST, "precision": "bf16", "seed": 9}, environ=environ, flags={"seed": 5})
    assert (job.seed, job.optimizer.learning_rate, job.precision, job.spares) == (5, 0.2, "bf16", 0)


def test_what_is_within_a_short_form_can_be_set() -> None:
    schedule = {"strategy": "convert", "global_batch_size": 32, "max_duration": "20ep", "warmup": "5ep"}
    job = resolve_job(
        {**SMALLEST, "schedule": schedule},
        environ={"ELASTIC_BATCH_SCHEDULE__SHAPE": "cosine", "ELASTIC_BATCH_SCHEDULE__WARMUP__START_FACTOR": "0"},
        flags={"schedule.shape.final_factor": 0.1},
    )
    assert job.dump()["schedule"]["shape"] == {"name": "cosine", "final_factor": 0.1}
    assert job.dump()["schedule"]["warmup"] == {"duration": "5ep", "start_factor": 0.0}


@pytest.mark.parametrize(
    "name", ["seed", "micro_batch_size", "optimizer__learning_rate", "schedule__factor", "schedule__global_batch_size"]
)
def test_a_truth_value_is_no_number(name: str) -> None:
    error = refusal(**{name: True})
    assert (error.field, error.rule) == (name.replace("__", "."), "must not be true or false")


def test_a_wrong_value_names_where_it_was_set() -> None:
    with pytest.raises(InvalidSetting, match="set by ELASTIC_BATCH_SEED"):
        resolve_job(SMALLEST, environ={"ELASTIC_BATCH_SEED": "-1"})
    assert "set by the command line" in str(refusal(seed=-1))


def test_a_misspelt_environment_variable_is_refused_with_the_field_that_was_meant() -> None:
    for variable, meant in (
        ("OPTIMISER__NAME", "ELASTIC_BATCH_OPTIMIZER"),
        ("SEDE", "ELASTIC_BATCH_SEED"),
        ("LEARNING_RATE", "ELASTIC_BATCH_OPTIMIZER__LEARNING_RATE"),
        ("EVERY", "ELASTIC_BATCH_CHECKPOINT__EVERY or ELASTIC_BATCH_EVALUATION__EVERY"),
    ):
        with pytest.raises(InvalidSetting, match=rf"ELASTIC_BATCH_{variable} = '1'.*Did you mean {meant}\?"):
            resolve_job(SMALLEST, environ={f"ELASTIC_BATCH_{variable}": "1"})


@pytest.mark.parametrize(
    "name",
    [
        "ADDRESS",
        "COORDINATOR",
        "FAULTS",
        "FAULTS_RECORD",
        "GOES_ON",
        "RUN_DIR",
        "SLOT",
        "TOKEN_FILE",
        "WORKER_NAME",
        "SERVICE_HOST",
        "SERVICE_PORT",
        "PORT",
        "PORT_7077_TCP_ADDR",
        "COORDINATOR_PORT",
        "COORDINATOR_SERVICE_HOST",
    ],
)
def test_a_variable_that_is_the_workers_or_kubernetes_sets_no_field(name: str) -> None:
    assert resolve_job(SMALLEST, environ={f"ELASTIC_BATCH_{name}": "1"}) == resolve_job(SMALLEST)


def test_assignments_need_a_name_and_a_value() -> None:
    assert parse_assignments(("seed=3", "data.root=/data", "model.args={width: 8}")) == {
        "seed": 3,
        "data.root": "/data",
        "model.args": {"width": 8},
    }
    with pytest.raises(InvalidSetting, match="NAME=VALUE"):
        parse_assignments(("seed",))


@pytest.mark.parametrize(
    ("flags", "field", "words"),
    [
        ({"optimizer.learning_rat": 1}, "optimizer.learning_rat", "Did you mean 'learning_rate'"),
        ({"optimizer.learning_rate": -1}, "optimizer.learning_rate", "must be greater than 0"),
        ({"optimizer.momentum": 1.0}, "optimizer.momentum", "must be less than 1"),
        ({"optimizer.name": "adm"}, "optimizer.name", "= 'adm': is not known. Did you mean 'adam'?"),
        ({"optimizer": 3}, "optimizer", "must be a section"),
        ({"optimizer.momentum": 0, "optimizer.nesterov": True}, "optimizer.nesterov", "needs a momentum"),
        ({"optimizer": {"name": "adam", "learning_rate": 1, "momentum": 0.9}}, "optimizer.momentum", "no such field"),
        ({"optimizer": {"target": "a:b", "rate": 1}}, "optimizer.rate", "no such field in optimizer"),
        ({"schedule.strategy": "grow"}, "schedule.strategy", "Did you mean 'grow-batch'"),
        ({"optimizer.name": "zzz"}, "optimizer.name", "must be one of adam, adamw, sgd"),
        ({"schedule": {}}, "schedule.strategy", "is required: one of adaptive"),
        ({"schedule.milestons": []}, "schedule.milestons", "Did you mean 'milestones'"),
        ({"schedule.max_duration": 90}, "schedule.max_duration", "a number with a unit"),
        ({"schedule.milestones": ["8ep", "9"]}, "schedule.milestones[1]", "a number with a unit"),
        ({"schedule.factor": 1}, "schedule.factor", "must be above 1"),
        ({"schedule.warmup": {"duraton": "1ep"}}, "schedule.warmup.duraton", "Did you mean 'duration'"),
        ({"precision": "float16"}, "precision", "Did you mean 'float32'"),
        ({"micro_batch_size": "many"}, "micro_batch_size", "must be a valid integer"),
        ({"micro_batches_per_pass": 0}, "micro_batches_per_pass", "must be 'auto', or must be greater"),
        ({"ghost_batch_size": 12}, "ghost_batch_size", "must divide micro_batch_size = 32"),
        ({"model.name": None}, "model.name", "either a name or a target"),
        ({"model.target": "a:b"}, "model.name", "either a name or a target"),
        ({"data.name": None, "data.target": "nothing"}, "data.target", "must be package.module:attribute"),
        ({"loss.name": "mse", "loss.label_smoothing": 0.1}, "loss.label_smoothing", "only cross-entropy"),
        ({"loggers": ["tensorbord"]}, "loggers[0]", "Did you mean 'tensorboard'"),
        ({"device": "gpu"}, "device", "must be auto, cpu, cuda or cuda:N"),
        ({"schedule.milestones": "8ep"}, "schedule.milestones", "must be a list, as in [8ep]"),
        ({"optimizer.weight_decay": float("inf")}, "optimizer.weight_decay", "must be a finite number"),
        ({"loss.args": {"reduction": "sum"}}, "loss.args", "is for a target of your own"),
        ({"loss.takes": "model, batch"}, "loss.takes", "is for a target of your own"),
        ({"seed": 2**64}, "seed", "must be less than 18446744073709551616"),
        ({"checkpoint.every": "0ep"}, "checkpoint.every", "must be above 0"),
        ({"seeed": 1}, "seeed", "Did you mean 'seed'"),
    ],
)
def test_each_mistake_is_one_error_that_names_field_and_rule(flags: dict[str, Any], field: str, words: str) -> None:
    error = refusal(**flags)
    assert error.field == field
    assert words in str(error)


def test_of_several_faults_the_others_are_named() -> None:
    with pytest.raises(InvalidSetting, match=r"^data = None: is required \(also wrong: micro_batch_size, model\)"):
        Job.parse({name: SMALLEST[name] for name in ("name", "optimizer", "schedule")})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"schedule.global_batch_size": 48}, "must be a multiple of micro_batch_size = 32"),
        ({"schedule.max_global_batch_size": 16}, "must not be below the first batch"),
        ({"schedule.max_global_batch_size": 1437}, "must be below the training set's 1437 samples"),
        ({"schedule.milestones": ["12ep", "8ep"]}, "Sort them"),
        ({"schedule.milestones": ["8ep", "20ep"]}, "past the end"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused_when_it_is_built(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSetting, match=words.replace("'", ".")):
        resolve_job(SMALLEST, flags=flags).build_schedule(1437)


@pytest.mark.parametrize(
    "flags",
    [
        {"name": "other"},
        {"data.root": "/elsewhere"},
        {"data.download": True},
        {"num_workers": 4},
        {"num_threads": 1},
        {"spares": 1},
        {"device": "cpu"},
        {"metrics_port": 9000},
        {"loggers": ["tensorboard"]},
        {"checkpoint.every": "2ep"},
        {"evaluation.every": None},
        {"micro_batches_per_pass": 4},
        {"schedule.max_duration": "40ep"},
        {"ghost_batch_size": 32},
    ],
)
def test_what_does_not_alter_the_trajectory_is_not_in_the_fingerprint(flags: dict[str, Any]) -> None:
    assert resolve_job(SMALLEST, flags=flags).fingerprint() == resolve_job(SMALLEST).fingerprint()


@pytest.mark.parametrize(
    "flags",
    [
        {"seed": 1},
        {"micro_batch_size": 16},
        {"ghost_batch_size": 16},
        {"optimizer.weight_decay": 1e-4},
        {"model.args": {"width": 8}},
        {"data.augmentation.crop_padding": 1},
        {"data.block_size": 64},
        {"loss.label_smoothing": 0.1},
        {"precision": "bf16"},
        {"max_grad_norm": 1.0},
        {"schedule.milestones": ["8ep", "13ep"]},
        {"schedule.strategy": "decay-lr"},
    ],
)
def test_what_alters_the_trajectory_is_in_the_fingerprint(flags: dict[str, Any]) -> None:
    assert resolve_job(SMALLEST, flags=flags).fingerprint() != resolve_job(SMALLEST).fingerprint()


@pytest.mark.parametrize(
    ("schedule", "matters"),
    [
        ({"strategy": "convert", "shape": "cosine"}, True),
        ({"strategy": "convert", "shape": {"name": "step", "every": "2ep", "gamma": 0.5}}, False),
        ({"strategy": "decay-lr", "milestones": ["0.5dur"], "factor": 2}, True),
        ({"strategy": "decay-lr", "milestones": ["3ep"], "factor": 2}, False),
    ],
)
def test_the_length_is_in_the_fingerprint_only_where_earlier_updates_depend_on_it(
    schedule: dict[str, Any], matters: bool
) -> None:
    def job(duration: str) -> Job:
        return Job.parse({**SMALLEST, "schedule": {**schedule, "global_batch_size": 32, "max_duration": duration}})

    assert (job("8ep").fingerprint() != job("9ep").fingerprint()) is matters


def test_plain_decay_keeps_the_first_batch_and_undoes_what_was_raised() -> None:
    job = resolve_job(SMALLEST, flags={"schedule.raised": {"learning_rate": 0.2}})
    plain = job.with_plain_decay()
    assert plain is not None
    schedule = plain.build_schedule(1437)
    assert [schedule.at(epoch * 1437).global_batch_size for epoch in (0, 8, 12)] == [32, 32, 32]
    assert [schedule.at(epoch * 1437).learning_rate for epoch in (0, 8, 12)] == [0.1, 0.05, 0.025]


def test_plain_decay_of_a_converted_schedule_is_that_schedule_at_a_fixed_batch() -> None:
    convert = {"strategy": "convert", "shape": "cosine", "global_batch_size": 32, "max_duration": "10ep"}
    plain = Job.parse({**SMALLEST, "schedule": convert}).with_plain_decay()
    assert plain is not None
    middle = plain.build_schedule(1437).at(5 * 1437)
    assert middle.global_batch_size == 32
    assert middle.learning_rate == pytest.approx(0.05)


def test_given_batches_have_no_plain_decay() -> None:
    steps = {"strategy": "steps", "points": "0:32 5ep:64", "max_duration": "10ep"}
    assert Job.parse({**SMALLEST, "schedule": steps}).with_plain_decay() is None


def test_adam_has_no_momentum_for_the_noise_scale() -> None:
    job = resolve_job({**SMALLEST, "optimizer": {"name": "adamw", "learning_rate": 1e-3}})
    assert job.build_schedule(1437).at(0).momentum == 0.0


def test_the_schema_describes_every_field() -> None:
    schema = job_schema()
    sections = [schema, *schema["$defs"].values()]
    undescribed = [
        (section.get("title"), name)
        for section in sections
        for name, field in section.get("properties", {}).items()
        if not field.keys() & {"description", "const", "$ref"}
    ]
    assert undescribed == []


def test_the_schema_takes_what_the_loader_takes() -> None:
    sections = job_schema()["$defs"]
    for name in ("StepsSchedule", "RampSchedule"):
        assert {"max_duration", "points"} <= set(sections[name]["required"])
        assert "global_batch_size" not in sections[name]["required"]
    assert sections["CheckpointSettings"]["properties"]["every"]["default"] == "1ep"
