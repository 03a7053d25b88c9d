"""Configuration: one name per setting everywhere, clear precedence, one clear line for every mistake."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import ConfigError
from broker.messages import Scalar
from fluffle.config import Config, from_values, load_config, new_run_id, settings, without_password
from fluffle.flags import FLAGS
from fluffle.layers import from_environment, from_flags, from_toml, to_toml
from workers.partition import _parse

DIGITS = from_values({"task": "digits"})


def load(*sets: str, env: Mapping[str, str] | None = None, **flags: str) -> Config:
    return load_config(DIGITS, from_environment(env or {}), from_flags(flags, sets))


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("task = 'digits'\n[train]\nlr = 3\nl2 = 3\nmomentum = 0.3\n[stop]\nrounds = 3\n")
    layers = (
        from_toml(file),
        from_environment({"FLUFFLE_TRAIN_L2": "4", "FLUFFLE_STOP_ROUNDS": "4", "HOME": "/"}),
        from_flags({"stop.rounds": "5", "run.seed": None}, []),
    )
    own = {"train.lr": 2.0, "train.batch_size": 2, "round.participants": 2}
    config = load_config(*layers, defaults=lambda task: own if task == "digits" else {})
    assert config.train.chosen() == {"lr": 3, "batch_size": 2, "l2": 4, "momentum": 0.3}
    assert (config.stop.rounds, config.round.participants, config.run.seed) == (5, 2, 42)


def test_it_becomes_what_the_aggregator_takes() -> None:
    config = load("train.lr=0.5", "run.id=my-run", "round.quorum=7", "broker.heartbeat_s=2")
    told = config.run_settings()
    assert (told.run_id, told.train, told.round.quorum, told.broker.heartbeat_s) == ("my-run", {"lr": 0.5}, 7, 2.0)
    assert config.run.dir == "runs/my-run"


def test_every_setting_is_reachable_in_every_way(tmp_path: Path) -> None:
    values = {"data.partition": "natural", "evaluation.mode": "none", "round.late": "fold", "task": "digits"}
    values |= {"train.schedule": "constant"}
    values |= {"stop.target_metric": "loss:1", "broker.url": "amqp://localhost", "run.id": "x", "run.dir": "y"}
    values |= {"study.attack": "little:1", "site.attack": "gaussian:2"}
    values |= {"train.optimiser": "adamw", "train.beta_1": "0.5", "train.beta_2": "0.5"}
    values |= {
        "train.momentum": "0.5",
        "site.http": "localhost:1",
        "site.device": "cuda:1",
        "store.url": "s3://bucket/prefix",
    }
    for setting in settings():
        default = "1" if setting.default is None else setting.written
        text = values.get(setting.name, default or "word")
        by_env = load_config(DIGITS, from_environment({setting.env: text}))
        by_set = load_config(DIGITS, from_flags({}, [f"{setting.name}={text}"]))
        section, _, key = setting.name.rpartition(".")
        assert _value(by_env, setting.name) == _value(by_set, setting.name)
        assert setting.description, f"{setting.name} has no description"
        file = tmp_path / "one.toml"
        head = f"[{section}]\n" if section else ""
        value = text if setting.type in ("int", "float", "bool") else f'"{text}"'
        file.write_text(f"{head}{key} = {value}\n")
        assert _value(load_config(DIGITS, from_toml(file)), setting.name) == _value(by_env, setting.name)


def _value(config: Config, name: str) -> object:
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_names_are_unique_and_flags_exist() -> None:
    names = [setting.name for setting in settings()]
    variables = [setting.env for setting in settings()]
    assert len(set(names)) == len(names)
    assert len(set(variables)) == len(variables)
    assert {flag.setting for flag in FLAGS} <= set(names)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["round.quorum=12"], r"round.quorum = 12 is above round.participants = 10: lower it or add participants"),
        (["round.quorum=3", "round.target=2"], r"round.quorum = 3 is above round.target = 2"),
        (["stop.rounds=abc"], r"stop.rounds = 'abc' \(--set\): .*valid integer"),
        (["stop.rounds=3.5"], r"stop.rounds = 3.5 .*valid integer"),
        (["stop.rounds=true"], r"stop.rounds = True .*valid integer"),
        (["stop.rounds=0"], r"stop.rounds = 0 .*greater than or equal to 1"),
        (["train.lr=nan"], r"train.lr = nan .*finite"),
        (["train.lr=[1, 2]"], r"train.lr = \[1, 2\] .*valid number"),
        (["train.lrr=1"], r"unknown setting 'train.lrr': did you mean train.lr\?"),
        (["quorum=1"], r"unknown setting 'quorum': did you mean round.quorum\?"),
        (["rounds.quorum=1"], r"did you mean round.quorum\?"),
        (["xyzzy=1"], r"unknown setting 'xyzzy': `fluffle settings` lists"),
        (["round=1"], r"round is a section: set one of its keys, as round.participants"),
        (["round.quorum"], r"--set round.quorum: write KEY=VALUE"),
        (["evaluation.mode=centrl"], r"evaluation.mode = 'centrl' .*'central', 'federated' or 'none'"),
        (["data.partition=dirichet:1"], r"data.partition = 'dirichet:1' .*dirichlet:ALPHA"),
        (["data.partition=dirichlet:0"], r"ALPHA above 0"),
        (["data.partition=shards:0"], r"shards:K"),
        (["broker.url=http://x"], r"broker.url = 'http://x' .*amqp://"),
        (["stop.target_metric=accuracy>0.9"], r"stop.target_metric = 'accuracy>0.9': write"),
        (["run.id=My Run"], r"run.id = 'My Run' .*a-z"),
        (["task="], r"no task is named"),
    ],
)
def test_a_mistake_is_one_line_that_names_thing_and_remedy(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load(*sets)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("FLUFFLE_ROUND_QUORM", r"FLUFFLE_ROUND_QUORM: did you mean FLUFFLE_ROUND_QUORUM\?"),
        ("FLUFFLE_DATA_DIRR", r"did you mean FLUFFLE_DATA_DIR\?"),
        ("FLUFFLE_TRAIN_LRR", r"FLUFFLE_TRAIN_LRR: unknown setting 'train.lrr': did you mean train.lr\?"),
    ],
)
def test_an_unknown_variable_is_an_error(variable: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(env={variable: "1"})


def test_variables_that_are_no_settings_are_left_alone() -> None:
    load(env={"FLUFFLE_AMQP_URL": "amqp://localhost", "FLUFFLE_DATA_DIR": "/data", "PATH": "/bin"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("round = 5", "round is a section"),
        ("[rounds]\nquorum = 5", "did you mean round.quorum"),
        ("[rund]", "unknown setting 'rund'"),
        ("[round]\nquorum = '5'", "round.quorum = '5'"),
        ("[round.deep]\nquorum = 5", "unknown setting 'round.deep.quorum'"),
        ("task = \n", "not valid TOML.*line 1"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(DIGITS, from_toml(file))
    assert "run.toml" in str(raised.value)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot read"):
        from_toml(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml: not valid TOML"):
        from_toml(tmp_path / "binary.toml")


def test_a_task_may_know_further_training_settings() -> None:
    own: dict[str, Scalar] = {"train.dropout": 0.5}
    config = load_config(DIGITS, from_flags({}, ["train.dropout=0.1"]), defaults=lambda _: own)
    assert config.train.chosen() == {"dropout": 0.1}
    with pytest.raises(ConfigError, match=r"train.dropout = \[1\] .*use a number, true, false or a text"):
        load_config(DIGITS, from_flags({}, ["train.dropout=[1]"]), defaults=lambda _: own)
    with pytest.raises(ConfigError, match=r"did you mean train\.dropout"):
        load_config(DIGITS, from_flags({}, ["train.drop_out=1"]), defaults=lambda _: own)


def test_text_settings_take_text_as_it_stands() -> None:
    config = load('run.id="quoted"', "run.dir=a#b", "broker.federation=2024")
    assert (config.run.id, config.run.dir, config.broker.federation) == ("quoted", "a#b", "2024")


def test_a_number_with_a_comment_is_not_cut() -> None:
    with pytest.raises(ConfigError, match="5 # five"):
        load("stop.rounds=5 # five")


def test_the_effective_configuration_reads_back(tmp_path: Path) -> None:
    config = load(
        "train.lr=1e-5", "train.batch_size=8", 'run.dir=C:\\dir "x"\t', "round.deadline_s=1e20", "run.seed=7"
    )
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config), "utf-8")
    assert load_config(from_toml(file)) == config


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_survives_toml(text: str) -> None:
    config = load_config(from_values({"task": "digits", "run.dir": text}))
    assert tomllib.loads(to_toml(config))["run"]["dir"] == text


def test_passwords_are_neither_kept_nor_shown() -> None:
    config = load("broker.url=amqp://me:hunter2@host:5672/vhost")
    assert "hunter2" not in to_toml(config)
    assert "FLUFFLE_BROKER_URL" in to_toml(config)
    assert without_password("amqps://me:hunter2@host/v") == "amqps://me@host/v"
    assert without_password("amqp://host:5672/v@x") == "amqp://host:5672/v@x"
    with pytest.raises(ConfigError) as raised:
        load("broker.url=http://me:hunter2@host")
    assert "hunter2" not in str(raised.value)


@given(st.text())
def test_every_run_gets_a_valid_name(task: str) -> None:
    name = new_run_id(task, datetime(2026, 11, 22, 17, 5, 9), "ab12")
    assert load(f"run.id={name}").run.id == name
    assert name.endswith("-20261122-170509-ab12")


@pytest.mark.parametrize(
    "partition", ["iid", "natural", "dirichlet:0.5", "dirichlet:1e-2", "quantity:0.5", "shards:2"]
)
def test_what_is_accepted_here_can_be_dealt(partition: str) -> None:
    config = load(**{"data.partition": partition})
    _parse(config.data.partition)


def test_a_missing_task_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="no task is named"):
        load_config()
