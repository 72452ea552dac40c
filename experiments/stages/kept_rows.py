"""Rows of a slow result, kept one by one, so that a stop loses only the current row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.runtime.run_directory import write_json


class KeptRows:
    """Rows of a table in a file, each written when it is done; rows of another origin are dropped.

    Attributes:
      path: the file.
      rows: by name.
      notes: remarks on each kind of features.
    """

    def __init__(self, path: Path, made_of: dict[str, Any]):
        self.path, self._made_of = path, made_of
        self.rows: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, list[str]] = {}
        try:
            stored = json.loads(path.read_text())
            if stored["made_of"] == made_of:
                self.rows, self.notes = stored["rows"], stored["notes"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a missing or damaged file starts anew

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows[name] = json.loads(json.dumps(row))  # in the form that is read back
        write_json(self.path, {"made_of": self._made_of, "rows": self.rows, "notes": self.notes})
