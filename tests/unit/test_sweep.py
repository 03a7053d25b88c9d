"""Sweeps without training: what a file means, what is refused, what is run again, and what results come to."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

from broker.errors import ConfigError
from fluffle.cell import Job, Outcome, run_cell
from fluffle.comparison import Group, Spread, line_of, reached, to_target, trajectory
from fluffle.config import from_values
from fluffle.curve import draw_lines
from fluffle.pools import on_this_machine, one_by_one
from fluffle.results import Result
from fluffle.sweep import Sweep, load_sweep
from fluffle.sweep_results import (
    Finished,
    SweepDir,
    draw,
    dumped,
    gathered,
    groups_of,
    job_of,
    run_cells,
    table_of,
)  # fmt: skip

SWEEP = """
seeds = [1, 2]
[base]
task = "digits"
round.participants = 4
[grid]
data.partition = ["iid", "shards:2"]
[variants.how]
fedavg = {}
fedadam = { strategy = { name = "fedadam", server_lr = 0.1 } }
pooled = { command = "central" }
[[skip]]
how = "pooled"
"data.partition" = "shards:2"
[report]
targets = [0.5]
to = ["rounds", "updates"]
panels = "data.partition"
"""


def load(tmp_path: Path, text: str = SWEEP) -> Sweep:
    file = tmp_path / "study.toml"
    file.write_text(text)
    return load_sweep(file)


def result(values: list[float], seed: int = 1) -> Result:
    rows = [
        {"round": number, "accepted": 4, "duration_s": 0.5, "metrics": {"accuracy": value, "loss": 1 - value}}
        for number, value in enumerate(values, 1)
    ]
    return {
        "task": "digits", "strategy": "fedavg", "rounds": len(values), "metrics": rows[-1]["metrics"],
        "history": rows, "updates": {"accepted": 4 * len(values)}, "bytes": {"up": 1000, "down": 2000},
        "wall_s": 1.0, "model_sha256": f"{seed:064d}",
    }  # fmt: skip


class Pool:
    """Runs nothing: answers with a result, or with an error for runs of fedadam."""

    def __init__(self, bad: str = "no such word") -> None:
        self.bad = bad
        self.jobs: list[Job] = []

    def submit(self, job: Job) -> Future[Outcome]:
        self.jobs.append(job)
        future: Future[Outcome] = Future()
        future.set_result(Outcome({}, "it broke") if self.bad in job.config else Outcome(result([0.4, 0.6])))
        return future


# -- the file --------------------------------------------------------------------------------------------------


def test_every_combination_but_the_skipped_ones_is_a_cell_for_every_seed(tmp_path: Path) -> None:
    sweep = load(tmp_path)
    assert sweep.axes == ("data.partition", "how")
    assert [cell.name for cell in sweep.cells][:2] == [
        "data.partition iid, how fedavg, seed 1",
        "data.partition iid, how fedavg, seed 2",
    ]
    assert len(sweep.cells) == 10
    adam = next(cell for cell in sweep.cells if cell.place == {"data.partition": "shards:2", "how": "fedadam"})
    assert (adam.command, adam.config.run.seed, adam.config.round.participants) == ("simulate", 1, 4)
    assert (adam.config.strategy.name, adam.config.data.partition) == ("fedadam", "shards:2")
    assert {cell.command for cell in sweep.cells if cell.place["how"] == "pooled"} == {"central"}


def test_digests_depend_on_what_a_result_depends_on_and_on_nothing_else(tmp_path: Path) -> None:
    digests = [cell.digest for cell in load(tmp_path).cells]
    assert len(set(digests)) == 10
    assert [cell.digest for cell in load(tmp_path).cells] == digests
    # a default that is written down, another order, another title, other reporting
    same = SWEEP.replace("[base]", 'title = "x"\n[base]\nround.deadline_s = 60.0').replace("[0.5]", "[0.6]")
    assert [cell.digest for cell in load(tmp_path, same).cells] == digests
    other = SWEEP.replace("round.participants = 4", "round.participants = 5")
    assert not {cell.digest for cell in load(tmp_path, other).cells} & set(digests)
    file = tmp_path / "study.toml"
    file.write_text(SWEEP)
    over_a_broker = load_sweep(file, from_values({"broker.url": "amqp://localhost", "broker.secrets": "a.toml"}))
    assert not {cell.digest for cell in over_a_broker.cells} & set(digests)
    elsewhere = load_sweep(file, from_values({"broker.url": "amqp://localhost", "broker.secrets": "b.toml"}))
    assert [cell.digest for cell in elsewhere.cells] == [cell.digest for cell in over_a_broker.cells]


def test_the_digest_of_a_known_cell_stays(tmp_path: Path) -> None:
    """If this fails on purpose, every sweep that anybody has is run anew."""
    (cell,) = load(tmp_path, 'seeds = [3]\n[base]\ntask = "digits"\nstop.rounds = 2').cells
    assert cell.digest[:16] == "c9fb4d282c7034bc"


def test_flags_win_over_the_base_and_axes_over_flags(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(SWEEP)
    sweep = load_sweep(file, from_values({"round.participants": 7, "strategy.name": "fedyogi"}))
    assert {cell.config.round.participants for cell in sweep.cells} == {7}
    assert [cell.config.strategy.name for cell in sweep.cells][:4] == ["fedyogi", "fedyogi", "fedadam", "fedadam"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "server_lr",
            "server_lrr",
            r"variants\.how\.fedadam: unknown setting 'strategy\.server_lrr': did you mean",
        ),
        ("round.participants", "round.particpants", r"base: unknown .*did you mean round\.participants\?"),
        ("[grid]", "[gird]", r"a sweep has no gird: did you mean grid\?"),
        ("targets", "target", r"a sweep has no report\.target: did you mean targets\?"),
        ('["iid", "shards:2"]', '"iid"', r"grid: data\.partition = 'iid': write a list"),
        ('["iid"', '["ii"', r"data\.partition = 'ii' \(.*, grid\): use iid"),
        ('["iid"', "[4", r"data\.partition = 4 \(.*, grid\)"),
        ('"central"', '"centrl"', r"command = 'centrl': use one of simulate, central, local"),
        ('how = "pooled"', 'how = "poled"', "there is no how poled: there are fedavg, fedadam, pooled"),
        ('how = "pooled"', 'who = "pooled"', r"there is no who pooled: there are data\.partition, how"),
        ('panels = "data.partition"', 'panels = "partition"', r"report\.panels = 'partition' is no axis"),
        ("seeds = [1, 2]", "seeds = []", "seeds: list should have at least 1"),
        ("seeds = [1, 2]", 'seeds = ["1"]', "seeds.0: input should be a valid integer"),
        ("round.participants = 4", "run.seed = 4", r"run\.seed cannot be set in a sweep: write seeds"),
        ("fedavg = {}", "fedavg = {}\nagain = {}", "how again, seed 1 is the same run as .*how fedavg, seed 1"),
        ('task = "digits"', "", "no task is named"),
        ("[base]", "[base", "not valid TOML"),
    ],
)
def test_what_cannot_work_is_refused_by_name(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in SWEEP
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, SWEEP.replace(old, new))


# -- running ---------------------------------------------------------------------------------------------------


def run(sweep: Sweep, kept: SweepDir, pool: Pool) -> Finished:
    finished = Finished({cell.digest: found for cell in sweep.cells if (found := kept.kept(cell))})
    for cell, outcome in run_cells([c for c in sweep.cells if c.digest not in finished.results], kept, pool.submit):
        finished.add(cell, outcome)
    return finished


def test_failed_and_unfinished_cells_are_run_again_and_the_others_not(tmp_path: Path) -> None:
    sweep, kept = load(tmp_path), SweepDir(tmp_path / "kept")
    kept.begin()
    broken, mended = Pool("fedadam"), Pool()
    finished = run(sweep, kept, broken)
    assert (len(broken.jobs), len(finished.results), len(finished.errors)) == (10, 6, 4)
    told = gathered(sweep, finished)
    assert [one["place"]["how"] for one in told["failed"]] == ["fedadam"] * 4
    assert told["failed"][0]["error"] == "it broke"
    kept.cell_file(sweep.cells[0]).write_text("{")  # a disk that lost it
    finished = run(sweep, kept, mended)
    assert len(mended.jobs) == 5
    assert not finished.errors
    assert not run(sweep, kept, unused := Pool()).errors
    assert not unused.jobs


def test_a_machine_that_is_lost_fails_its_cell_only(tmp_path: Path) -> None:
    sweep, kept = load(tmp_path), SweepDir(tmp_path / "kept")
    kept.begin()
    pool = Pool()

    def submit(job: Job) -> Future[Outcome]:
        future = pool.submit(job)
        if len(pool.jobs) == 1:
            future = Future()
            future.set_exception(ConnectionError("gone"))
        return future

    outcomes = [outcome for _, outcome in run_cells(sweep.cells, kept, submit)]
    assert sorted(outcome.error for outcome in outcomes) == [""] * 9 + ["ConnectionError: gone"]


def test_a_job_is_the_whole_configuration(tmp_path: Path) -> None:
    cell = load(tmp_path).cells[0]
    assert 'task = "digits"' in job_of(cell).config
    assert "participants = 4" in job_of(cell).config
    assert job_of(cell).run_id.startswith(f"study-{cell.digest[:8]}-")


def test_what_a_broken_cell_said_last_is_its_error() -> None:
    outcome = run_cell(Job("simulat", 'task = "digits"', "x"))
    assert outcome == Outcome({}, "Error: No such command 'simulat'. Did you mean 'simulate'? (exit code 2)")


def test_a_cell_ends_with_its_sweep() -> None:
    """A cell whose standard input ends has lost its sweep; here it waits for a file that nobody writes."""
    code = "import fluffle.cell as c, time; c._run = lambda *_: time.sleep(100); c.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(b'{"command": "simulate", "config": "", "run_id": "x"}\n')
    process.stdin.close()
    assert process.wait(30) == 3


def test_leaving_a_pool_ends_what_runs_in_it() -> None:
    endless = Job("simulate", 'task = "digits"\nstop.rounds = 1000000', "x")
    with on_this_machine(1) as submit:
        first, second = submit(endless), submit(endless)
    assert "(exit code 3)" in first.result(0).error
    assert second.cancelled()


def test_over_a_broker_the_run_that_was_left_unfinished_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []

    def fake(job: Job, began: object) -> Outcome:
        told.append((job.run_id, job.abandon))
        return Outcome({}, "killed") if job.run_id == "b" else Outcome({"rounds": 1})

    monkeypatch.setattr("fluffle.pools.run_cell", fake)
    for names in ("ab", "cd"):  # two sweeps, one after the other
        with one_by_one(tmp_path / "unfinished") as submit:
            for future in [submit(Job("simulate", "", name)) for name in names]:
                future.result()
    assert told == [("a", ""), ("b", ""), ("c", "b"), ("d", "")]


# -- results ---------------------------------------------------------------------------------------------------


def test_targets_count_rounds_updates_and_seconds() -> None:
    points = trajectory(result([0.1, 0.5, 0.4, 0.8]), "accuracy")
    found = reached(points, "accuracy", 0.5)
    assert found
    assert (found.rounds, found.updates, found.seconds) == (2, 8, 1.0)
    assert reached(points, "accuracy", 0.81) is None
    below = reached(trajectory(result([0.1, 0.5, 0.4, 0.8]), "loss"), "loss", 0.3)
    assert below
    assert below.rounds == 4


def test_spreads_are_over_seeds() -> None:
    assert str(Spread.of([0.5])) == "0.5"
    spread = Spread.of([0.5, 0.7])
    assert (spread.n, spread.low, spread.high) == (2, 0.5, 0.7)
    assert spread.sd == pytest.approx(0.1414, abs=1e-4)
    group = Group({"how": "x"}, (result([0.1, 0.9]), result([0.6, 0.8, 0.9])))
    until = to_target(group, "accuracy", 0.5, "rounds")
    assert until
    assert (until.n, until.mean) == (2, 1.5)
    line = line_of(group, "accuracy")
    assert [point.value for point in line.points] == pytest.approx([0.35, 0.85])
    assert (line.low, line.high) == ((0.1, 0.8), (0.6, 0.9))


def test_tables_and_pictures_come_from_the_json(tmp_path: Path) -> None:
    sweep, kept = load(tmp_path), SweepDir(tmp_path / "kept")
    kept.begin()
    told = json.loads(dumped(gathered(sweep, run(sweep, kept, Pool()))))
    rows = table_of(told)
    assert rows[0] == (
        "data.partition", "how", "accuracy", "least", "most", "n", "rounds to 0.5", "updates to 0.5",
    )  # fmt: skip
    assert rows[1] == ("iid", "fedavg", "0.6 ± 0", "0.6", "0.6", "2", "2 ± 0", "8 ± 0")
    assert len(rows) == 6
    told["sweep"]["report"]["columns"] = "how"
    assert table_of(told) == [
        ("data.partition", "fedavg", "fedadam", "pooled"),
        ("iid", "0.6 ± 0", "0.6 ± 0", "0.6 ± 0"),
        ("shards:2", "0.6 ± 0", "0.6 ± 0", ""),
    ]
    draw(told, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert told["groups"][0]["to"]["0.5"]["rounds"]["mean"] == 2
    assert all(len(group.results) == 2 for group in groups_of(told["cells"]))


def test_participants_alone_are_a_band() -> None:
    alone = {"metrics": {"accuracy": 0.5}, "participants": [{"metrics": {"accuracy": v}} for v in (0.4, 0.6)]}
    line = line_of(Group({"run": "alone"}, (alone,)), "accuracy")
    assert line.flat
    assert (line.low, line.high, line.points[0].value) == ((0.4,), (0.6,), 0.5)
    figure = draw_lines(
        {"": [line, line_of(Group({"run": "a"}, (result([0.1, 0.2]),)), "accuracy")]}, "", "accuracy"
    )
    (axes,) = figure.axes
    assert [drawn.get_label() for drawn in axes.lines] == ["alone", "a"]
