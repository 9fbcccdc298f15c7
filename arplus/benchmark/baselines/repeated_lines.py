"""DuckDB and Polars: they drop the repeated lines of raw records and do nothing else, no parsing and no encoding."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from arplus import storage
from arplus.benchmark.figures import NOT_INSTALLED
from arplus.process import peak_memory_bytes

Count = Callable[[list[str]], tuple[int, int]]
"""Gives how many lines files have, and how many distinct ones."""


class Deduplicated(NamedTuple):
    """What dropping the repeated lines took."""

    lines: int
    distinct: int
    seconds: float
    peak_memory_bytes: int


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
    counted: Any = lines.query("lines", "SELECT count(*), count(DISTINCT line) FROM lines")
    ((n, distinct),) = counted.fetchall()
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


def drop(count: Count, source: str) -> Deduplicated | str:
    """Counts the lines of the files in a process of its own; or says why there is no figure."""
    if not storage.is_local(source):
        return "not compared: it reads local files here"
    files = [storage.resolve(file)[1] for file in storage.list_files(source)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_timed, count, files).result()
        except ImportError:
            return NOT_INSTALLED
        except Exception as error:  # another program's limits are a line of the table, not our failure
            return f"failed: {str(error).splitlines()[0][:200]}"


def _timed(count: Count, files: list[str]) -> Deduplicated:
    start = time.perf_counter()
    lines, distinct = count(files)
    seconds = time.perf_counter() - start
    return Deduplicated(lines, distinct, seconds, peak_memory_bytes())
