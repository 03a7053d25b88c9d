"""W4: many participants, who share few processes.

    python -m benchmarks.scale

1 KB of parameters, five rounds: 100, 1,000 and 10,000 participants on the embedded broker, 100 and 1,000 over
RabbitMQ. A round's cost must grow with the number of participants and not faster. References: the cost of as many
runs with a tenth of them, and what the same takes without Fluffle (see `control_plane`).
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks import embedded
from benchmarks.fleet import Load, Measured, rabbit, run_bare, run_fluffle
from benchmarks.measure import Line, command, line, report, table

FEW = Load(participants=100, floats=256, rounds=5, processes=2, heartbeat_s=60.0)
MANY, CROWD = replace(FEW, participants=1_000), replace(FEW, participants=10_000)
MOST_GROWTH, MOST_EMBEDDED_S = 2.0, 0.2


def grown(where: str, count: int, large: Measured, small: Measured, **aim: float) -> Line:
    """Ten times as many, against ten times the cost of the few."""
    return line(
        "W4",
        f"{count:,} {where}, against ten times {count // 10:,}",
        "CPU s/round",
        large.cpu_s,
        10 * small.cpu_s,
        **aim,
    )


def measure() -> dict[str, object]:
    with rabbit(few=FEW, many=MANY) as node:
        few, many = run_fluffle(node, "few", FEW), run_fluffle(node, "many", MANY)
        bare = run_bare(node, "many", MANY, many.sizes)
    alone = [embedded.run(load) for load in (FEW, MANY, CROWD)]
    floor = embedded.run(MANY, bare=True)
    lines = [
        grown("over RabbitMQ", 1_000, many, few, most_ratio=MOST_GROWTH),
        line("W4", "1,000 over RabbitMQ, against bare aio-pika", "CPU s/round", many.cpu_s, bare.cpu_s),
        line("W4", "1,000 over RabbitMQ", "s/round", many.seconds, bare.seconds),
        grown("embedded", 1_000, alone[1], alone[0], most_ratio=MOST_GROWTH),
        grown("embedded", 10_000, alone[2], alone[1], most_ratio=MOST_GROWTH),
        line("W4", "1,000 embedded", "s/round", alone[1].seconds, floor.seconds, most=MOST_EMBEDDED_S),
        line("W4", "1,000 embedded", "CPU s/round", alone[1].cpu_s, floor.cpu_s),
        line("W4", "10,000 embedded, peak", "MB", alone[2].peak_mb["all"]),
        *(
            line("W4", f"1,000 over RabbitMQ, {who}", "MB at most", many.peak_mb[who], bare.peak_mb[who])
            for who in ("aggregator", "workers", "rabbitmq")
        ),
    ]
    details = {"few": few.details, "many": many.details, "many_bare": bare.details, "asyncio": floor.details}
    details |= {
        f"embedded_{load.participants}": one.details for load, one in zip((FEW, MANY, CROWD), alone, strict=True)
    }
    return report("scale", lines, details) | {"table": table(lines)}


main = command("scale", measure)

if __name__ == "__main__":
    main()
