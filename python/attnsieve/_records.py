"""Dataclasses as JSON files of a schema: what calibrations are saved as."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from os import PathLike
from pathlib import Path
from typing import Any


def write_record(path: str | PathLike[str], record: Any, schema: int) -> None:
    """``record``, a dataclass, as JSON."""
    text = json.dumps({"schema": schema, **asdict(record)}, indent=2)
    Path(path).write_text(text + "\n", encoding="utf-8")


def read_record(path: str | PathLike[str], kind: type, schema: int, tables: tuple[str, ...]) -> Any:
    """What :func:`write_record` wrote of a ``kind``.

    Args:
        tables: fields that are numbers in tuples of any depth.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not of this kind and schema; the text names what is wrong.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.pop("schema", None) != schema:
            raise ValueError(f"schema: expected {schema}")
        names = {field.name for field in fields(kind)}
        for word, keys in (("missing", names - record.keys()), ("unknown", record.keys() - names)):
            if keys:
                raise ValueError(f"{word} {', '.join(sorted(keys))}")
        for name in tables:
            record[name] = _numbers(record[name])
        return kind(**record | {"lengths": tuple(record["lengths"])})
    except (ValueError, TypeError) as error:  # of JSON and of UTF-8 too
        raise ValueError(f"{path}: not a calibration: {error}") from error


def _numbers(table: Any) -> Any:
    return tuple(map(_numbers, table)) if isinstance(table, list) else float(table)
