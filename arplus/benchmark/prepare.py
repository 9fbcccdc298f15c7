"""The preparation: sessions a second from raw records to the committed manifest, and its peak memory.

Beside it, duckdb and polars drop the repeated lines of the same files and do nothing else: no parsing, no encoding.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt

from arplus import storage
from arplus.benchmark.machine import Usage
from arplus.benchmark.report import NOT_INSTALLED, Output, Result, rate, size
from arplus.config import PrepareConfig, SynthesizeConfig
from arplus.prepare.pipeline import prepare
from arplus.process import peak_memory_bytes
from arplus.synthetic.write import synthesize


@dataclass(frozen=True, kw_only=True)
class PrepareBenchmark(Output):
    """Measures the preparation of raw records."""

    input: str | None = None
    """URI of raw records; by default they are generated."""
    output: str | None = None
    """URI of the data set to make, which stays; by default a temporary folder."""
    records: Annotated[int, Gt(0)] = 400_000
    """Records generated where there is no input."""
    duplicates: Annotated[int, Ge(0)] = 18_000
    """How many of them repeat an earlier one."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if self.input is None and self.duplicates >= self.records:
            yield "duplicates", f"must be fewer than records = {self.records} (got {self.duplicates})"


class Deduplicated(NamedTuple):
    """What dropping the repeated lines took."""

    lines: int
    distinct: int
    seconds: float
    peak_memory_bytes: int


def measure(config: PrepareBenchmark) -> Result:
    """Measures on the connected Ray cluster."""
    with tempfile.TemporaryDirectory() as folder:
        source = config.input or str(Path(folder, "records.jsonl.gz"))
        if config.input is None:
            synthesize(SynthesizeConfig(output=source, records=config.records, duplicates=config.duplicates))
        output = config.output or str(Path(folder, "data"))
        # The rules' defaults are for the full data set; a share of the sessions serves any size.
        settings = PrepareConfig(input=source, output=output, valid=0.01, test=0.01)
        with Usage(memory=True) as usage:
            manifest = prepare(settings)
        others = {name: deduplicate_alone(function, source) for name, function in OTHERS.items()}
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
        ("CPU s a million records", f"{usage.cpu_seconds / records * 1e6:.1f} (of processes alive at the end)"),
        ("peak memory", f"{size(usage.peak_memory_bytes)} (PSS of all processes, object store included)"),
    ]
    for name, found in others.items():
        done = found if isinstance(found, Deduplicated) else None
        figures[f"{name}_lines_per_second"] = done and done.lines / done.seconds
        figures[f"{name}_peak_memory_bytes"] = done and done.peak_memory_bytes
        table.append((f"{name}, repeated lines alone", _line(found)))
    return Result(figures=figures, table=table)


def _line(found: Deduplicated | str) -> str:
    if isinstance(found, str):
        return found
    return (
        f"{rate(found.lines / found.seconds)} lines/s ({found.seconds:.1f} s), {size(found.peak_memory_bytes)}, "
        f"{found.lines - found.distinct:,} repeated lines"
    )


def with_duckdb(files: list[str]) -> tuple[int, int]:
    """Lines, and distinct ones, by duckdb; a line is one column of a CSV file without quotes."""
    import duckdb

    lines = duckdb.read_csv(
        files,
        header=False,
        columns={"line": "VARCHAR"},
        delimiter="\x01",
        quotechar="",
        escapechar="",
        ignore_errors=True,  # it takes no line that is not UTF-8
    )
    ((n, distinct),) = lines.query("lines", "SELECT count(*), count(DISTINCT line) FROM lines").fetchall()
    return int(n), int(distinct)


def with_polars(files: list[str]) -> tuple[int, int]:
    """Lines, and distinct ones, by polars, the same way."""
    import polars

    lines = polars.scan_csv(
        files, has_header=False, separator="\x01", quote_char=None, new_columns=["line"], encoding="utf8-lossy"
    )
    counts = lines.select(n=polars.len(), distinct=polars.col("line").n_unique()).collect(engine="streaming")
    n, distinct = counts.row(0)
    return int(n), int(distinct)


OTHERS = {"duckdb": with_duckdb, "polars": with_polars}


def deduplicate_alone(function: Callable[[list[str]], tuple[int, int]], source: str) -> Deduplicated | str:
    """Runs ``function`` on the files in a process of its own; or says why there is no figure."""
    if not storage.is_local(source):
        return "not compared: it reads local files here"
    files = [storage.resolve(file)[1] for file in storage.list_files(source)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        try:
            return process.submit(_timed, function, files).result()
        except ImportError:
            return NOT_INSTALLED
        except Exception as error:  # another program's limits are a line of the table, not our failure
            return f"failed: {str(error).splitlines()[0][:200]}"


def _timed(function: Callable[[list[str]], tuple[int, int]], files: list[str]) -> Deduplicated:
    start = time.perf_counter()
    lines, distinct = function(files)
    seconds = time.perf_counter() - start
    return Deduplicated(lines, distinct, seconds, peak_memory_bytes())
