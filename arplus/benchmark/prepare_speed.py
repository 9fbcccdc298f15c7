"""How fast raw records are prepared: sessions per second to the committed manifest, and the peak memory.

Beside it, DuckDB and Polars drop the repeated lines of the same files.
"""

import tempfile
from pathlib import Path

from arplus.benchmark.baselines import repeated_lines
from arplus.benchmark.figures import Result, rate, size
from arplus.benchmark.options import PrepareBenchmark
from arplus.benchmark.usage import Usage
from arplus.cluster import connection
from arplus.config import PrepareConfig, SynthesizeConfig
from arplus.prepare.pipeline import prepare
from arplus.synthetic.write import synthesize

REPEATED = 0.045
"""Share of the generated records that repeat an earlier one."""


def measure(config: PrepareBenchmark) -> Result:
    """Joins Ray, and measures on its cluster."""
    connection.connect()
    with tempfile.TemporaryDirectory() as folder:
        source = config.input or str(Path(folder, "records.jsonl.gz"))
        if config.input is None:
            repeated = int(REPEATED * config.records)
            synthesize(SynthesizeConfig(output=source, records=config.records, duplicates=repeated))
        output = config.output or str(Path(folder, "data"))
        # The rules' defaults are for the full data set; a share of the sessions serves any size.
        settings = PrepareConfig(input=source, output=output, valid=0.01, test=0.01)
        with Usage(memory=True) as usage:
            manifest = prepare(settings)
        others = {name: repeated_lines.drop(count, source) for name, count in repeated_lines.OTHERS.items()}
    sessions, records = manifest.sessions, manifest.records
    figures: dict[str, float | None] = {
        "records_per_second": records / usage.seconds,
        "sessions_per_second": sessions / usage.seconds,
        "cpu_seconds_per_million_records": usage.cpu_seconds / records * 1e6,
        "peak_memory_bytes": usage.peak_memory_bytes,
    }
    table = [
        ("records", f"{records:,} ({manifest.duplicates['exact_record']:,} repeated lines)"),
        ("sessions", f"{sessions:,}"),
        ("records/s", rate(records / usage.seconds)),
        ("sessions/s", f"{rate(sessions / usage.seconds)} ({usage.seconds:.1f} s)"),
        ("CPU s per million records", f"{usage.cpu_seconds / records * 1e6:.1f} (of processes alive at the end)"),
        ("peak memory", f"{size(usage.peak_memory_bytes)} (PSS of all processes, object store included)"),
    ]
    for name, found in others.items():
        done = found if isinstance(found, repeated_lines.Deduplicated) else None
        figures[f"{name}_lines_per_second"] = done and done.lines / done.seconds
        figures[f"{name}_peak_memory_bytes"] = done and done.peak_memory_bytes
        table.append((f"{name}, repeated lines alone", _line(found)))
    return Result(figures=figures, table=table)


def _line(found: repeated_lines.Deduplicated | str) -> str:
    if isinstance(found, str):
        return found
    return (
        f"{rate(found.lines / found.seconds)} lines/s ({found.seconds:.1f} s), {size(found.peak_memory_bytes)}, "
        f"{found.lines - found.distinct:,} repeated lines"
    )
