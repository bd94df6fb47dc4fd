"""How a run shows itself: words, one line a minute, a bar, silence."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
from rich.console import Console

from elastic_batch.cli.progress import Bar, Lines, Silence, Words, open_display

RECORD: dict[str, Any] = {
    "phase": 1,
    "global_batch_size": 64,
    "learning_rate": 0.1,
    "loss": 0.25,
    "noise_scale": 22.453,
    "measured_noise_scale": None,
    "samples_per_second": 1234.5,
}


def test_words_have_phase_batch_lr_loss_noise_scale_and_speed() -> None:
    words = Words(total=4000, num_samples=1000)
    words.metrics = {"accuracy": 0.97}
    assert words.of(1500, {**RECORD, "measured_noise_scale": 513.0}) == (
        "epoch 1.50/4, phase 1, batch 64, lr 0.1, loss 0.2500, g 22.45, measured 513, 1234 samples/s, "
        "test accuracy 0.9700"
    )


def test_without_a_terminal_there_is_one_line_a_minute() -> None:
    written: list[str] = []
    now = 0.0
    lines = Lines(4000, 1000, write=written.append, clock=lambda: now)
    for position in range(0, 1300, 10):  # a sample takes a tenth of a second
        now = position / 10
        lines.update(position, RECORD)
    assert len(written) == 2
    assert written[0].endswith("6 min left")  # 3400 samples of 0.1 s


def test_time_left_of_a_resumed_run_counts_only_what_this_process_did() -> None:
    written: list[str] = []
    now = 0.0
    lines = Lines(4000, 1000, write=written.append, clock=lambda: now)
    lines.update(3000, RECORD)
    now = 60.0
    lines.update(3100, RECORD)
    assert written[0].endswith("9 min left")  # 900 samples of 0.6 s


def test_a_terminal_gets_a_bar_and_the_log_above_it() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    display = open_display(0, 4000, 1000, console)
    assert isinstance(display, Bar)
    with display:
        display.update(1500, RECORD)
        logging.getLogger("elastic_batch.test").info("the batch grows")
        display.evaluation({"accuracy": 0.97})
        display.update(1564, RECORD)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "the batch grows" in shown
    assert "test accuracy 0.97" in shown


def test_workers_other_than_the_first_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    display = open_display(3, 4000, 1000)
    assert isinstance(display, Silence)
    with display:
        display.update(1500, RECORD)
        display.evaluation({"accuracy": 0.97})
        logging.getLogger("elastic_batch.test").info("saved")
        logging.getLogger("elastic_batch.test").warning("no memory")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "worker 3: no memory\n")
