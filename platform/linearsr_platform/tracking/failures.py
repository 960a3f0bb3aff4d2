"""What a failure of MLflow means: that the store is away for now, or that it refuses."""

import re

from linearsr_platform.remote import without_logins

LONGEST_REASON = 120
BORROWED = ("requests", "urllib3", "botocore", "boto3", "s3transfer", "sqlalchemy")
"""Packages that MLflow reaches its stores through; what they raise is about the way there."""


def is_transient(error: BaseException) -> bool:
    """Tell whether the same call may succeed later: no connection, no answer in time, too many requests, a failure of the server.

    What MLflow calls the caller's mistake, 4xx in HTTP's terms, is not.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
        return status == 429 or status >= 500
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in BORROWED


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without the passwords in its URLs: MLflow quotes its server's."""
    return without_logins((str(error).strip() or type(error).__name__).splitlines()[0])


def reason(error: BaseException) -> str:
    """Return why a call failed, short enough for a line: the system's own words where a chain of libraries wraps them."""
    line = first_line(error)
    found = re.search(r"\[Errno -?\d+\] ([^'\")\]]+)", line)
    return (found.group(1) if found else line)[:LONGEST_REASON]
