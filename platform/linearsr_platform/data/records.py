"""What an interrupted `prepare` had finished: a small JSON file for each piece of work, written after it, removed at the end."""

import json
from collections.abc import Iterator, Mapping
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
    urls = {storage.filesystem(file)[1]: file for file in files}
    found: dict[str, bytes | Exception] = fs.cat(list(urls), on_error="return")
    return {storage.name_of(url).removesuffix(".json"): json.loads(content) for url, content in _whole(urls, found)}


def _whole(urls: Mapping[str, str], found: Mapping[str, bytes | Exception]) -> Iterator[tuple[str, bytes]]:
    """Yield URL and content of each file; those that a store failed to give are read again, one by one."""
    for path, content in found.items():
        if isinstance(content, bytes):
            yield urls[path], content
        elif not isinstance(content, FileNotFoundError):
            yield urls[path], storage.read_bytes(urls[path])
