"""Who is there, who is asked, which version is best, and when a run is over."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import plan
from aggregator.progress import best_of, evaluation_due, improves, parse_target, why_finished
from aggregator.registry import Registry, sample
from broker.errors import ConfigError
from broker.head import Best, HeadRecord
from broker.messages import Where
from tests.federation import names, settings

MODEL = Where(where="inline", size_bytes=1, sha256="a" * 64)


# -- who is there ---------------------------------------------------------------------------------------------


def test_who_was_heard_lives_for_so_long() -> None:
    registry = Registry((), 0.0, liveness_s=10.0)
    assert registry.hear("p01", 100.0)
    assert not registry.hear("p01", 105.0)
    registry.hear("p02", 101.0)
    assert registry.live(110.9) == ["p01", "p02"]
    assert registry.live(111.0) == ["p01"]
    assert registry.live(115.0) == []
    assert registry.hear("p01", 120.0)


def test_members_are_presumed_to_live_until_they_had_their_time() -> None:
    registry = Registry(["p02", "p01"], 100.0, liveness_s=10.0)
    assert registry.live(109.0) == ["p01", "p02"]
    assert registry.live(110.0) == []


def test_who_left_is_gone_at_once_and_may_come_back() -> None:
    registry = Registry(["p01"], 0.0, liveness_s=10.0)
    registry.leave("p01")
    registry.leave("never-heard-of")
    assert registry.live(1.0) == []
    assert registry.hear("p01", 2.0)
    assert registry.last_heard() == {"p01": 2.0}


# -- who is asked ---------------------------------------------------------------------------------------------


@given(live=st.sets(st.sampled_from(names(30))), size=st.integers(0, 35), seed=st.integers(0, 99))
def test_a_sample_is_without_replacement_from_the_live(live: set[str], size: int, seed: int) -> None:
    chosen = sample(sorted(live), size, seed, 1)
    assert set(chosen) <= live
    assert len(set(chosen)) == len(chosen) == (min(size, len(live)) if size else len(live))
    assert list(chosen) == sorted(chosen)


def test_a_sample_follows_from_seed_and_round_alone() -> None:
    live = names(20)
    samples = {(seed, number): sample(live, 5, seed, number) for seed in range(5) for number in range(5)}
    assert samples == {key: sample(live, 5, *key) for key in samples}
    assert len(set(samples.values())) > 20


def test_everybody_is_asked_equally_often() -> None:
    asked = Counter(p for number in range(2000) for p in sample(names(10), 3, 42, number))
    assert all(500 < asked[p] < 700 for p in names(10))


# -- whether a round opens ------------------------------------------------------------------------------------


def test_the_first_round_waits_for_everybody_but_not_longer_than_a_deadline() -> None:
    run = settings(3, round={"quorum": 2, "deadline_s": 30.0})
    first, later = HeadRecord(), HeadRecord(task=1, members=("p01",))
    assert not plan.enough(first, 2, run, 29.9)
    assert plan.enough(first, 3, run, 0.0)
    assert plan.enough(first, 2, run, 30.0)
    assert not plan.enough(first, 1, run, 1e9)
    assert plan.enough(later, 2, run, 0.0)


def test_no_round_opens_for_nobody() -> None:
    assert not plan.enough(HeadRecord(task=1), 0, settings(3), 1e9)


def test_a_late_joiner_is_asked_while_there_is_room() -> None:
    run = settings(3, round={"cohort": 3})
    record = plan.opened(HeadRecord(model=MODEL), "train", names(2), run, 0.0)
    assert record.open
    assert plan.has_room(record.open, "p09", run)
    assert not plan.has_room(record.open, "p01", run)
    assert not plan.has_room(record.open.model_copy(update={"cohort": tuple(names(3))}), "p09", run)
    assert not plan.has_room(record.open.model_copy(update={"work": "evaluate"}), "p09", run)


def test_tasks_are_numbered_through_and_remember_their_base() -> None:
    run = settings(2, round={"staleness_max": 1})
    record = HeadRecord(epoch=4, model=MODEL)
    for _ in range(9):
        record = plan.opened(record, "train", names(2), run, 100.0)
    assert record.open
    assert (record.task, record.open.task, record.open.epoch, record.open.deadline) == (9, 9, 4, 130.0)
    assert record.lineage == tuple((task, 0, MODEL.sha256) for task in range(4, 10))


# -- what is measured and when it ends ------------------------------------------------------------------------


def closed(number: int, best: Best | None = None, **metrics: float) -> HeadRecord:
    """A record that closed round `number`; the run began at second 1000."""
    return HeadRecord(round=number, version=number, model=MODEL, metrics=metrics, best=best, started=1000.0)


def test_versions_are_measured_every_nth_round_and_the_last() -> None:
    run = settings(1, rounds=5, evaluation={"mode": "central", "every": 2})
    assert [number for number in range(1, 6) if evaluation_due(run, "central", number)] == [2, 4, 5]
    assert not any(evaluation_due(run, "federated", number) for number in range(1, 6))


@pytest.mark.parametrize(
    ("metric", "better", "worse"),
    [
        *[(name, 0.9, 0.8) for name in ("accuracy", "macro_f1", "macro_recall", "recall_3", "accuracy_worst_10")],
        *[(name, 0.9, 0.8) for name in ("accuracy_mean", "accuracy_min", "accuracy_max", "macro_f1_worst_10")],
        *[(name, 0.1, 0.2) for name in ("loss", "train_loss", "loss_worst_10", "accuracy_std", "rmse_max", "mae")],
        ("rmse", 5, 6),
    ],
)
def test_the_best_version_is_kept_in_the_metrics_own_direction(metric: str, better: float, worse: float) -> None:
    assert improves(metric, better, worse)
    assert not improves(metric, worse, better)
    assert not improves(metric, better, better)
    first = best_of(closed(1, **{metric: worse}), metric)
    assert first == Best(version=1, round=1, value=worse, sha256=MODEL.sha256)
    second = best_of(closed(2, first, **{metric: better}), metric)
    assert second is not None
    assert second.version == 2
    for value in (worse, better):  # the first of equals stays
        assert best_of(closed(3, second, **{metric: value}), metric) == second


def test_a_run_ends_after_its_rounds() -> None:
    run = settings(1, rounds=3)
    assert why_finished(closed(2), run, 1000.0) == ""
    assert why_finished(closed(3), run, 1000.0) == "all 3 rounds done"


@pytest.mark.parametrize(
    ("target", "short", "reached"),
    [("accuracy:0.9", {"accuracy": 0.89}, {"accuracy": 0.9}), ("rmse:55", {"rmse": 55.1}, {"rmse": 55.0})],
)
def test_a_run_ends_when_its_target_is_reached(
    target: str, short: dict[str, float], reached: dict[str, float]
) -> None:
    run = settings(1, rounds=9, stop={"target_metric": target})
    assert why_finished(closed(2, **short), run, 0.0) == ""
    assert why_finished(closed(2, loss=0.0), run, 0.0) == ""
    assert why_finished(closed(2, **reached), run, 0.0) == f"reached {target}"


def test_a_run_ends_when_nothing_got_better_for_so_many_evaluations() -> None:
    run = settings(1, rounds=99, stop={"patience": 2}, evaluation={"mode": "central", "every": 3})
    best = Best(version=3, round=3, value=0.5, sha256=MODEL.sha256)
    assert why_finished(closed(8, best), run, 0.0) == ""
    assert why_finished(closed(9, best), run, 0.0) == "no better version for 2 evaluations"
    assert why_finished(closed(9), run, 0.0) == ""


def test_a_run_ends_after_its_seconds() -> None:
    run = settings(1, rounds=9, stop={"max_seconds": 60.0})
    assert why_finished(closed(1), run, 1059.9) == ""
    assert why_finished(closed(1), run, 1060.0) == "60 seconds passed"


def test_a_target_that_is_no_number_is_one_clear_error() -> None:
    assert parse_target("accuracy:0.9") == ("accuracy", 0.9)
    for target in ("accuracy", "accuracy:high", "accuracy=0.9"):
        with pytest.raises(ConfigError, match="write it as NAME:VALUE"):
            parse_target(target)


def test_after_training_comes_the_evaluation_then_the_next_round_or_the_end() -> None:
    run = settings(2, rounds=2, evaluation={"mode": "federated"})
    after = plan.continued(closed(1), "train", names(2), run, 1000.0)
    assert after.open
    assert (after.open.work, after.open.round) == ("evaluate", 1)
    after = plan.continued(after.with_(open=None), "evaluate", names(2), run, 1000.0)
    assert after.open
    assert (after.open.work, after.open.round) == ("train", 2)
    assert plan.continued(closed(2), "evaluate", names(2), run, 1000.0).finished == "all 2 rounds done"


def test_without_enough_participants_the_run_waits_between_rounds() -> None:
    run = settings(3, round={"quorum": 2})
    waiting = plan.continued(closed(1), "train", names(1), run, 1000.0)
    assert (waiting.open, waiting.finished) == (None, "")
