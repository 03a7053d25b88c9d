"""What a quantised base costs and saves: MiniLM under LoRA on the SpamAssassin corpus, in one participant.

    fluffle data fetch minilm && fluffle data fetch spam-assassin
    python -m benchmarks.quantised

The same 256 mails and steps for each form, with one thread; memory is that of the whole model with its adapters.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import numpy as np

from benchmarks.measure import command, line, report, table
from workers.data import Dataset
from workers.hf.quantised import Form, size_bytes
from workers.modules import use_threads
from workers.task import TrainConfig
from workers.tasks.spam import SPAM

FORMS: tuple[Form, ...] = ("", "int8", "nf4")
TRAINED, HELD_OUT, STEPS = 256, 256, 32


@dataclass(frozen=True, slots=True)
class Found:
    """`loss` and `accuracy` are of held-out mails, after training."""

    model_mb: float
    seconds_per_step: float
    loss: float
    accuracy: float


def measured(form: Form, train: Dataset, held_out: Dataset) -> Found:
    bound = replace(SPAM, quantised=form, device="cpu").bind(train, held_out)
    config = TrainConfig(1, 7, {"max_steps": STEPS, "local_epochs": 2, "schedule": "constant"})
    began = time.monotonic()
    result = bound.train(bound.initial(), config)
    seconds = (time.monotonic() - began) / STEPS
    metrics = bound.evaluate(result.arrays).metrics
    return Found(size_bytes(bound.model.module) / 1e6, seconds, metrics["loss"], metrics["accuracy"])


def measure() -> dict[str, object]:
    use_threads()
    mails = SPAM.load()
    order = np.random.default_rng(0).permutation(len(mails))
    train, held_out = mails.take(order[:TRAINED]), mails.take(order[TRAINED : TRAINED + HELD_OUT])
    found = {form: measured(form, train, held_out) for form in FORMS}
    plain, lines = found[""], []
    for form in FORMS[1:]:
        one = found[form]
        lines += [
            line("quantised", f"{form}: model", "MB", one.model_mb, plain.model_mb),
            line("quantised", f"{form}: a step", "s", one.seconds_per_step, plain.seconds_per_step),
            line("quantised", f"{form}: loss", "", one.loss, plain.loss),
            line("quantised", f"{form}: accuracy", "", one.accuracy, plain.accuracy),
        ]
    details = {form or "float32": asdict(one) for form, one in found.items()}
    return report("quantised", lines, details) | {"table": table(lines)}


main = command("quantised", measure)

if __name__ == "__main__":
    main()
