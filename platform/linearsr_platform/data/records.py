"""What an interrupted `prepare` had finished: a small JSON file for each piece of work, written after it, removed at the end."""

import json
from typing import Any

from linearsr_platform import storage

FOLDER = "unfinished"
"""Below the folder of the manifest; gone once that is written."""


def folder_of(output_url: str) -> str:
    """Return the URL of the folder of records."""
    return storage.join(output_url, FOLDER)


def write_record(folder: str, name: str, content: object) -> None:
    """Write `folder`/`name`.json at once, on one line."""
    storage.write_text(storage.join(folder, f"{name}.json"), json.dumps(content, allow_nan=False))


def read_records(folder: str, kind: str) -> dict[str, Any]:
    """Read every record whose name begins with `kind`, by name; those of a remote store many at a time."""
    files = storage.list_files(folder, f"{kind}*.json")
    if not files:
        return {}
    fs, _ = storage.filesystem(folder)
    paths = {storage.filesystem(file)[1]: storage.name_of(file).removesuffix(".json") for file in files}
    contents = fs.cat(list(paths), on_error="omit")
    return {paths[path]: json.loads(content) for path, content in contents.items()}
