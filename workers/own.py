"""What is a participant's own: it stays at the worker, from one counted update to the next, and never travels.

- `fragment/`: with `strategy.fragments`, what local training made of the tensors that were not due (Streaming
  DiLoCo, Douillard et al., 2025).
- `local/`: tensors that `personal.local` names. FedBN (Li et al., 2021): those of norm layers, parameters and
  statistics. FedPer (Arivazhagan et al., 2019): those of the head, trained together with the rest.
- `ditto/`: the personal model v_i of Ditto (Li et al., 2021, Algorithm 1).
- `control/`: the control variate c_i of SCAFFOLD.
- `task/`: what the learning task asked to keep, such as the moments of its optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from broker.codecs import BESIDE
from broker.messages import TrainRound
from broker.tensors import Arrays, check_like
from broker.travelling import controls_in, due, is_local, named_controls, shared, zero_controls
from workers import control
from workers.task import LearningTask, TrainConfig, TrainResult

LOCAL, FRAGMENT, DITTO, TASK = "local/", "fragment/", "ditto/", "task/"


@dataclass(frozen=True, slots=True)
class Own:
    """What an order's work begins with. `kept`: all five, by prefix and name. `lost`: there was some, and it is
    gone. `server_control`: SCAFFOLD's c, empty before the first round."""

    told: TrainRound
    kept: Arrays = field(default_factory=dict)
    lost: bool = False
    server_control: Arrays = field(default_factory=dict)

    def model(self, base: Arrays) -> Arrays:
        """The global model with this participant's own tensors in it; lost ones are the global model's."""
        local = _under(LOCAL, self.kept) if self.told.local else {}
        local |= _under(FRAGMENT, self.kept)
        return {name: local.get(name, values) for name, values in base.items()} if local else base

    def judged(self, base: Arrays) -> Arrays:
        """What this participant would use: its personal model, if it has one, else `model`."""
        return (_under(DITTO, self.kept) if self.told.ditto else {}) or self.model(base)

    def config(self, base: Arrays, config: TrainConfig) -> TrainConfig:
        """What the task is told: its own state, and the correction of SCAFFOLD."""
        config = replace(config, state=_under(TASK, self.kept))
        if self.told.wants == "delta+control":
            server = self._server(base)
            config = replace(config, correction=control.correction(server, self._control(server)))
        return config

    def beside(self, base: Arrays, start: Arrays, result: TrainResult) -> Arrays:
        """What travels beside the update: Delta c_i."""
        if self.told.wants != "delta+control":
            return {}
        return named_controls(control.change(start, result, self._server(base)))

    def after(self, base: Arrays, result: TrainResult, beside: Arrays, train: Callable[[Arrays], Arrays]) -> Arrays:
        """What is kept if this update is counted. `train` trains a personal model, held to the global one."""
        found = {TASK + name: values for name, values in result.state.items()}
        found |= {LOCAL + name: result.arrays[name] for name in base if is_local(name, self.told.local)}
        travels = shared(base, self.told.local)
        stays = travels.keys() - due(travels, self.told.fragments, self.told.round).keys()
        found |= {FRAGMENT + name: result.arrays[name] for name in stays}
        if beside:
            own = self._control(self._server(base))
            found |= {BESIDE + name: own[name] + values for name, values in controls_in(beside).items()}
        if self.told.ditto:
            found |= {DITTO + name: values for name, values in train(self.judged(base)).items()}
        return found

    def _server(self, base: Arrays) -> Arrays:
        return self.server_control or zero_controls(shared(base, self.told.local))

    def _control(self, server: Arrays) -> Arrays:
        """c_i: as kept; c, once it was lost; zero for who takes part for the first time."""
        return controls_in(self.kept) or (server if self.lost else {name: 0 * c for name, c in server.items()})


def own_of(
    told: TrainRound, kept: Arrays, base: Arrays, *, since: int = 0, lost: bool = False, server: Arrays
) -> Own:
    """`since`: the round of the update that it was kept with. Raises BadMessage if what was kept, or the server's
    control variate, does not fit the model."""
    travels = named_controls(zero_controls(shared(base, told.local)))
    if server:
        check_like(server, travels)
    _check(kept, BESIDE, travels)
    _check(kept, LOCAL, {LOCAL + name: values for name, values in base.items() if is_local(name, told.local)})
    _check(kept, DITTO, {DITTO + name: values for name, values in base.items()})
    kept = _still_own(told, kept, shared(base, told.local), since)
    return Own(told, kept, lost, controls_in(server))


def _still_own(told: TrainRound, kept: Arrays, travels: Arrays, since: int) -> Arrays:
    """Without fragments that were due since then: they are the global model's, whoever took part. What is evaluated
    is all of it the global model's."""
    held = {name.removeprefix(FRAGMENT): name for name in kept if name.startswith(FRAGMENT)}
    if not held:
        return kept
    check_like({name: kept[held[name]] for name in held}, {name: v for name, v in travels.items() if name in held})
    missed = range(max(since, told.round - told.fragments), told.round)
    synchronised = {name for number in missed for name in due(travels, told.fragments, number)}
    gone = {held[name] for name in held if name in synchronised or told.work == "evaluate"}
    return {name: values for name, values in kept.items() if name not in gone}


def is_needed(told: TrainRound) -> bool:
    """Whether an order's work depends on what is this participant's own, so that its loss should be told."""
    return bool(told.local) or told.ditto > 0 or told.fragments > 1 or told.wants == "delta+control"


def train_personal(
    task: LearningTask, told: TrainRound, base: Arrays, config: TrainConfig
) -> Callable[[Arrays], Arrays]:
    """v <- v - eta (grad F_i(v) + lambda (v - w)), as many steps as the global model w got (Ditto, Algorithm 1): a
    proximal term as FedProx has it, but held to w and not to where v begins."""
    settings = {**config.settings, "mu": told.ditto}
    config = replace(config, settings=settings, origin=base, correction={}, state={}, wants="delta")
    return lambda start: task.train(start, config).arrays


def _check(kept: Arrays, prefix: str, like: Arrays) -> None:
    if found := {name: values for name, values in kept.items() if name.startswith(prefix)}:
        check_like(found, like)


def _under(prefix: str, kept: Arrays) -> Arrays:
    return {name.removeprefix(prefix): values for name, values in kept.items() if name.startswith(prefix)}
