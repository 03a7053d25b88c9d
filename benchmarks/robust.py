"""Robust strategies against attackers, on real data: the accuracy that is left.

`digits` with 20 participants, 10 rounds, as `fluffle simulate` runs it; seeds are those of split and training.
It takes some minutes for each seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean

from broker.messages import Scalar
from fluffle import simulate
from fluffle.logs import configure_logs

PARTICIPANTS, ROUNDS = 20, 10
RULES = ("fedavg", "clipped", "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median")
ATTACKS = ("", "sign-flip:10", "gaussian:10", "little:5")
FIRST_IMPOSSIBLE = {"bulyan": 5}  # attackers among 20


def settings(rule: str, attack: str, attackers: int, partition: str, seed: int) -> dict[str, Scalar]:
    clipped = rule == "clipped"
    asked: dict[str, Scalar] = {
        "round.participants": PARTICIPANTS, "round.quorum": PARTICIPANTS, "stop.rounds": ROUNDS, "run.seed": seed,
        "strategy.name": "fedavg" if clipped else rule, "strategy.byzantine": attackers,
        "strategy.clip_norm": 1.0 if clipped else 0.0, "data.partition": partition, "evaluation.every": ROUNDS,
    }  # fmt: skip
    return asked | ({"study.attack": attack, "study.attackers": attackers} if attack else {})


def accuracy(asked: dict[str, Scalar]) -> float:
    with tempfile.TemporaryDirectory() as directory:
        return float(simulate("digits", {**asked, "run.dir": directory}).summary["metrics"]["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--partition", default="iid")
    parser.add_argument("--attackers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    configure_logs("error")
    rows = []
    for attackers in asked.attackers:
        print(f"\n{attackers} attackers of {PARTICIPANTS}, {asked.partition}, accuracy after {ROUNDS} rounds")
        print("| Rule | " + " | ".join(attack or "none" for attack in ATTACKS) + " |")
        for rule in RULES:
            cells = []
            for attack in ATTACKS if attackers < FIRST_IMPOSSIBLE.get(rule, PARTICIPANTS) else ():
                runs = [
                    settings(rule, attack, attackers, asked.partition, seed) for seed in range(1, asked.seeds + 1)
                ]
                found = [accuracy(run) for run in runs]
                rows.append({"rule": rule, "attack": attack, "attackers": attackers, "accuracy": found})
                cells.append(f"{fmean(found):.3f}")
            print(f"| {rule} | " + " | ".join(cells or ["refused"] * len(ATTACKS)) + " |", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"partition": asked.partition, "runs": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
