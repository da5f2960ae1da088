"""Measurements kept on disk as they are made, so that a killed run loses none."""

import json
from pathlib import Path


class RecordFile:
    """A file of JSON lines: the settings that all of it was measured with, then a record a line.

    Args:
        path: created where it is not there; the records that it holds are kept.
        settings: all that they depend on, in JSON's types.

    Raises:
        ValueError: if the file holds records of other settings.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, settings = path, json.loads(json.dumps(settings))
        text = path.read_text() if path.is_file() else ""
        *lines, rest = text.split("\n")  # the rest was cut off
        found, *self.records = map(json.loads, lines or ["{}"])
        differ = sorted(key for key in found | settings if found.get(key) != settings.get(key))
        if self.records and differ:
            raise ValueError(
                f"{path} was measured with {', '.join(f'{key}={found.get(key)!r}' for key in differ)}, not "
                f"{', '.join(f'{key}={settings.get(key)!r}' for key in differ)}. Take another folder, or delete it."
            )
        if rest or not self.records:  # all of it or nothing: the name appears when the file is whole
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in [settings, *self.records]))
            unfinished.replace(path)

    def add(self, records: list[dict]) -> None:
        """Appends records, all of them or, where the process is killed meanwhile, the first ones."""
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
        self.records += records
