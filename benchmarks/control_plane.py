"""W1: how many rounds a second, if nothing is trained and the model is small.

    python -m benchmarks.control_plane

Ten participants and 1 KB of parameters, over RabbitMQ as processes and on the embedded broker in one. Reference:
the same messages by bare aio-pika; for the embedded broker, the same bytes through queues of asyncio and back.
"""

from __future__ import annotations

from benchmarks import embedded
from benchmarks.fleet import Load, rabbit, run_bare, run_fluffle
from benchmarks.measure import Line, command, line, report, table

LOAD = Load(participants=10, floats=256, rounds=100, warm_up=10)
EMBEDDED = Load(participants=10, floats=256, rounds=500, warm_up=20)
LEAST_RATIO, LEAST_EMBEDDED = 0.6, 500


def measure() -> dict[str, object]:
    with rabbit(w1=LOAD) as node:
        ours = run_fluffle(node, "w1", LOAD)
        bare = run_bare(node, "w1", LOAD, ours.sizes)
    alone, floor = embedded.run(EMBEDDED), embedded.run(EMBEDDED, bare=True)
    lines: list[Line] = [
        line("W1", "RabbitMQ", "rounds/s", 1 / ours.seconds, 1 / bare.seconds, least_ratio=LEAST_RATIO),
        line("W1", "RabbitMQ, all processes", "CPU s/round", ours.cpu_s, bare.cpu_s),
        line("W1", "embedded", "rounds/s", 1 / alone.seconds, 1 / floor.seconds, least=LEAST_EMBEDDED),
        line("W1", "embedded", "CPU s/round", alone.cpu_s, floor.cpu_s),
    ]
    details = {"rabbitmq": ours.details, "bare": bare.details, "embedded": alone.details, "asyncio": floor.details}
    return report("control_plane", lines, details) | {"table": table(lines)}


main = command("control_plane", measure)

if __name__ == "__main__":
    main()
