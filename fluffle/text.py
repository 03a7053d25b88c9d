"""Results in words, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fluffle.results import Result, headline
from fluffle.rundir import RunDir

UNITS = ("B", "kB", "MB", "GB", "TB")


def summary(result: Result, run: RunDir) -> str:
    """What came out, where it is, and what to try next."""
    updates = ", ".join(f"{count} {fate}" for fate, count in result["updates"].items())
    sizes = ", ".join(f"{size_text(size)} {way}" for way, size in result["bytes"].items())
    files = "".join(f"  {name:<9}{path}\n" for name, path in run.artefacts().items() if path.exists())
    return (
        f"\n{result['task']} is finished ({result['why_finished'] or 'stopped'}): "
        f"version {result['model_version']} after {result['rounds']} rounds in {result['wall_s']:.1f} s\n"
        f"  {metrics_text(result['metrics']) or 'not evaluated'}\n"
        f"  updates: {updates}; {sizes}\n\n{files}\n"
        f"next: fluffle runs show {run.path}    fluffle evaluate {run.path}    fluffle central {result['task']}\n"
    )


def metrics_text(metrics: Mapping[str, float]) -> str:
    """`accuracy 0.9012, loss 0.3456`, the headline first."""
    first = headline(metrics)
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in sorted(metrics, key=lambda name: name != first))


def size_text(size: float) -> str:
    """`12.3 MB`, in powers of a thousand."""
    for unit in UNITS[:-1]:
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} {UNITS[-1]}"


def columns(rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned columns, the first row being their names."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "".join(f"{line.rstrip()}\n" for line in lines)
