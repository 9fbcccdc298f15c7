"""Names that a user gives, by the rules of MLflow 3 and of file systems: what is wrong with one is said before a run.

MLflow itself is not asked, as importing it takes seconds; ``tests/test_names.py`` compares the rules with its own.
"""

import posixpath
import re
import unicodedata

LONGEST_RUN_NAME = 250
"""Characters of a run's name: of the column that MLflow's servers keep it in."""
LONGEST_FOLDER_NAME = 250
"""Bytes of a folder's name: file systems take 255, and a study's best settings are named after it and "-best"."""
LONGEST_EXPERIMENT_NAME = 500
LONGEST_TAG_NAME = 250


def run_name_problem(name: str) -> str | None:
    """What is wrong with a run's name, which is that of its folder too; None for a good one, or for none."""
    if name and not _is_path(name):
        return f"must be the path of a folder within --storage, without .. and the like (got {name!r})"
    longest = max(len(part.encode(errors="surrogatepass")) for part in name.split("/"))
    if len(name) > LONGEST_RUN_NAME or longest > LONGEST_FOLDER_NAME:
        has = f"has {len(name)} characters, and a folder of {longest} bytes"
        return f"must have at most {LONGEST_RUN_NAME} characters, and as many bytes as a folder's name ({has})"
    return _character_problem(name)


def model_name_problem(name: str) -> str | None:
    """What is wrong with a study's name, under which MLflow registers its best model; None for a good one, or none."""
    if name and (not name.strip() or "/" in name or ":" in name):
        return (
            "is the name under which MLflow registers the best model, and must not be blank or hold / or : "
            f"(got {name!r})"
        )
    return run_name_problem(name)


def experiment_name_problem(name: str) -> str | None:
    """What is wrong with the name of an MLflow experiment; None for a good one, or for none."""
    if len(name) > LONGEST_EXPERIMENT_NAME:
        return f"must have at most {LONGEST_EXPERIMENT_NAME} characters (has {len(name)})"
    return _character_problem(name)


def tag_problem(item: str) -> str | None:
    """What is wrong with KEY=VALUE of an MLflow run's tag; None for a good one."""
    key, _, value = (part.strip() for part in item.partition("="))
    if not key or not value:
        return f"must be KEY=VALUE (got {item!r})"
    if len(key) > LONGEST_TAG_NAME or not re.fullmatch(r"[/\w.\- :]+", key) or not _is_path(key):
        return f"has a KEY that MLflow does not take: up to {LONGEST_TAG_NAME} letters, digits, _ . - : (got {key!r})"
    return None


def _is_path(name: str) -> bool:
    """Whether a name is the path of something within a folder, in its shortest form."""
    return posixpath.normpath(name) == name and not name.startswith(("..", "/")) and name != "."


def _character_problem(name: str) -> str | None:
    if wrong := sorted({c for c in name if unicodedata.category(c) in ("Cc", "Cs")}):
        return f"must not hold control characters, or bytes that are not UTF-8 (got {wrong[0]!r} in {name!r})"
    return None
