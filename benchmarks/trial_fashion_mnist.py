"""Does a growing batch reach what a decaying learning rate reaches? Three strategies, three seeds, real photographs.

Run `python benchmarks/trial_fashion_mnist.py`. It trains recipe `fashion-mnist` nine times, one CPU thread each, draws
the runs into docs/results/fashion-mnist/ and prints a verdict. Run it again after an interruption: what is finished is
kept, what is begun goes on. Exit codes: 0 the claim holds; 1 it does not, or a run failed; 75 stopped before the end.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from elastic_batch.report import write_report
from elastic_batch.rundir import read_summary
from elastic_batch.strict_json import to_json

RECIPE = "fashion-mnist"
STRATEGIES = ("decay-lr", "hybrid", "grow-batch")
SEEDS = (0, 1, 2)
LARGEST_DIFFERENCE = 0.005  # of mean test accuracies: half a point
RESUMABLE = 75  # as `elastic-batch train` exits when it was stopped and can go on
SECONDS_TO_STOP = 120  # an update and a checkpoint, on a busy machine
SECONDS_SAY_NOTHING = (
    "Do not compare the seconds: the runs trained beside each other, and some were stopped and resumed, with more or\n"
    "less of the machine each time."
)
"""What the report's table needs to be told of; it is made for runs that had a machine to themselves."""
ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "elastic_batch")


@dataclass(frozen=True)
class Trial:
    """One of the runs: a strategy with a seed."""

    strategy: str
    seed: int

    @property
    def name(self) -> str:
        """Its run directory's name."""
        return f"{self.strategy}-{self.seed}"


@dataclass(frozen=True)
class Result:
    """What a finished run did."""

    strategy: str
    seed: int
    updates: int
    planned_updates: int
    accuracy: float


@dataclass(frozen=True)
class Verdict:
    """Whether the claim holds, and the numbers behind that.

    Attributes:
        means: The mean test accuracy of each strategy.
        difference: The largest difference between two of the means.
        allowed_difference: What it may be.
        pooled_range: The range of all runs' accuracies after taking their own strategy's mean away: what seeds do.
        as_planned: Whether every run did as many updates as its plan says.
        holds: Whether the difference is within both bounds, and the updates as planned.
    """

    means: Mapping[str, float]
    difference: float
    allowed_difference: float
    pooled_range: float
    as_planned: bool
    holds: bool


class Stopped(Exception):
    """A signal, or the time is up."""


def main() -> int:
    """Train what is missing, report, judge."""
    options = parse_options()
    options.runs.mkdir(parents=True, exist_ok=True)
    trials = [Trial(strategy, seed) for seed in SEEDS for strategy in STRATEGIES]
    with open(options.runs / "lock", "w", encoding="utf-8") as lock:
        try:
            # Runs inherit the lock: it is held until the last of them has ended, even where this process was killed.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{options.runs} is in use by another trial: wait for it, or give --runs", file=sys.stderr)
            return 1
        try:
            train_all(trials, options, lock)
        except Stopped as stop:
            print(f"Stopped: {stop}. The same command goes on from here.")
            return RESUMABLE
    return judge_and_report(trials, options)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="runs at a time; default: CPUs")
    parser.add_argument("--minutes", type=float, default=60, help="stop, resumable, after these; default: 60")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / RECIPE, help="where run directories are")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / RECIPE, help="where to report")
    options = parser.parse_args()
    if options.parallel < 1:
        parser.error(f"--parallel {options.parallel}: at least one run at a time is needed")
    return options


def train_all(trials: Sequence[Trial], options: argparse.Namespace, lock: IO[str]) -> None:
    """Train the unfinished runs, a few at a time, one thread each: faster in total than one run on all cores.

    Raises:
        Stopped: A signal, the time, or a run that failed; every run has been told to save, and has ended.
    """
    waiting = [trial for trial in trials if not is_finished(options.runs / trial.name)]
    active: dict[Trial, subprocess.Popen[bytes]] = {}
    deadline = time.monotonic() + 60 * options.minutes
    received: list[signal.Signals] = []  # looked at between steps: an exception could lose a run just started
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(signal.Signals(number)))
    try:
        while waiting or active:
            while waiting and len(active) < options.parallel:
                trial = waiting.pop(0)
                active[trial] = start(trial, options.runs, lock)
                print(f"{time.strftime('%H:%M:%S')} {trial.name} started; {len(waiting)} wait", flush=True)
            time.sleep(1)
            for trial in [trial for trial, run in active.items() if run.poll() is not None]:
                check_end(trial, active.pop(trial).returncode, options.runs)
            if received:
                raise Stopped(received[0].name)
            if time.monotonic() > deadline:
                raise Stopped(f"{options.minutes:g} minutes are over")
    finally:
        end_all(active.values())


def start(trial: Trial, runs: Path, lock: IO[str]) -> subprocess.Popen[bytes]:
    """Start a run in a session of its own: Ctrl-C reaches this process only, which tells the runs."""
    job = ("train", RECIPE, "--strategy", trial.strategy, "--seed", str(trial.seed))
    where = ("--run-dir", str(runs / trial.name), "--resume", "auto")
    with open(runs / f"{trial.name}.log", "ab") as log:
        return subprocess.Popen(
            (*COMMAND, *job, *where),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )


def check_end(trial: Trial, code: int, runs: Path) -> None:
    """Say how a run ended; one that did not finish ends the trial."""
    log = runs / f"{trial.name}.log"
    if code == RESUMABLE:
        raise Stopped(f"{trial.name} was told to stop")
    if code:
        raise SystemExit(f"{trial.name} failed with exit code {code}; the end of {log}:\n{tail(log)}")
    print(f"{time.strftime('%H:%M:%S')} {trial.name} finished: {final_accuracy(runs / trial.name):.2%}", flush=True)


def end_all(active: Collection[subprocess.Popen[bytes]]) -> None:
    """Let every run finish its update and save, and wait for that."""
    for run in active:
        run.send_signal(signal.SIGTERM)
    for run in active:
        try:
            run.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            run.kill()  # loses what came after the last checkpoint


def judge_and_report(trials: Sequence[Trial], options: argparse.Namespace) -> int:
    """Draw and tabulate the runs, print the table and the verdict."""
    directories = {trial: options.runs / trial.name for trial in trials}
    report = write_report(directories.values(), options.output)
    with open(options.output / "table.md", "a", encoding="utf-8") as table:
        table.write(f"\n{SECONDS_SAY_NOTHING}\n")
    results = [read_result(trial, directory) for trial, directory in directories.items()]
    verdict = judge(results)
    record = {"verdict": asdict(verdict), "runs": [asdict(result) for result in results]}
    (options.output / "trial.json").write_text(to_json(record, indent=2) + "\n", encoding="utf-8")
    print((options.output / "table.md").read_text(encoding="utf-8"))
    print(in_words(verdict))
    print(f"Picture: {options.output}/overview.png, and {len(report.files)} more files")
    return 0 if verdict.holds else 1


def judge(results: Sequence[Result]) -> Verdict:
    """Compare the strategies' mean accuracies with half a point and with what seeds alone do."""
    accuracies = {
        strategy: [result.accuracy for result in results if result.strategy == strategy]
        for strategy in dict.fromkeys(result.strategy for result in results)
    }
    means = {strategy: sum(values) / len(values) for strategy, values in accuracies.items()}
    difference = max((abs(a - b) for a, b in itertools.combinations(means.values(), 2)), default=0.0)
    residuals = [value - means[strategy] for strategy, values in accuracies.items() for value in values]
    pooled_range = max(residuals) - min(residuals)
    as_planned = all(result.updates == result.planned_updates for result in results)
    holds = as_planned and difference <= min(LARGEST_DIFFERENCE, pooled_range)
    return Verdict(means, difference, LARGEST_DIFFERENCE, pooled_range, as_planned, holds)


def in_words(verdict: Verdict) -> str:
    """The verdict as sentences."""
    claim = "holds" if verdict.holds else "does NOT hold"
    updates = "as planned" if verdict.as_planned else "NOT as planned"
    return (
        f"The claim {claim}: mean test accuracies differ by {100 * verdict.difference:.2f} points at most "
        f"(allowed: {100 * verdict.allowed_difference:.2f}, and the seeds' own range of "
        f"{100 * verdict.pooled_range:.2f}); updates {updates}."
    )


def read_result(trial: Trial, directory: Path) -> Result:
    """Read what a finished run did."""
    summary = read_summary(directory)
    updates, planned = summary["updates"], summary["planned_updates"]
    return Result(trial.strategy, trial.seed, updates, planned, final_accuracy(directory))


def is_finished(directory: Path) -> bool:
    """Whether a run came to its end, its last evaluation included."""
    summary = read_summary(directory)
    return bool(summary.get("finished")) and "accuracy" in summary.get("metrics", {})


def final_accuracy(directory: Path) -> float:
    """The test accuracy at the end."""
    return float(read_summary(directory)["metrics"]["accuracy"])


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


if __name__ == "__main__":
    sys.exit(main())
