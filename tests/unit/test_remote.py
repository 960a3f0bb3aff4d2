"""What is tried again and what is not, for how long, and that no secret is shown."""

import errno
import logging
from http.client import IncompleteRead
from io import BytesIO

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from linearsr_platform import storage
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.remote import CutOffError, Patience, passes, shown, tried


def boto(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def caused(error: BaseException, by: BaseException) -> BaseException:
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (boto("SlowDown", 503), True),
        (boto("Unknown", 429), True),
        (caused(OSError(errno.EIO, "what s3fs makes of unknown codes"), boto("TooManyRequests", 429)), True),
        (OSError(errno.EBUSY, "Please reduce your request rate"), True),
        (EndpointConnectionError(endpoint_url="http://127.0.0.1"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (CutOffError("got 1 bytes"), True),
        (boto("AccessDenied", 403), False),
        (FileNotFoundError("x"), False),
        (caused(PermissionError("x"), boto("ExpiredToken", 400)), False),
        (NoCredentialsError(), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("x"), False),
    ],
)
def test_only_faults_that_pass_are_tried_again(error: BaseException, again: bool) -> None:
    assert passes(error) is again


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.waits_s: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits_s.append(seconds)
        self.now_s += seconds

    def __call__(self) -> float:
        return self.now_s


def test_waits_grow_and_end(caplog: pytest.LogCaptureFixture) -> None:
    clock, calls = Clock(), []

    def fail() -> None:
        calls.append(clock.now_s)
        raise ConnectionResetError("the line is dead")

    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionResetError) as raised:
        tried("s3://user:secret@bucket/x?key=1", fail, sleep=clock.sleep, clock=clock)
    assert len(calls) == 6
    assert all(0.1 * 2**i <= wait <= 0.2 * 2**i for i, wait in enumerate(clock.waits_s))
    assert len(set(clock.waits_s)) == 5
    assert [record.message for record in caplog.records][:1] == [
        "s3://***@bucket/x?***: try 1 of 6 failed: ConnectionResetError: the line is dead"
    ]
    assert raised.value.__notes__ == ["s3://***@bucket/x?***: given up after 6 tries"]


def test_calls_that_hang_do_not_add_up() -> None:
    clock, calls = Clock(), []

    def hang() -> None:
        calls.append(1)
        clock.now_s += 20
        raise TimeoutError

    with pytest.raises(TimeoutError):
        tried("s3://bucket/x", hang, sleep=clock.sleep, clock=clock)
    assert len(calls) == 2


def test_success_after_faults_is_a_success() -> None:
    answers: list[Exception | int] = [ConnectionResetError(), TimeoutError(), 7]

    def one() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert tried("s3://bucket/x", one, patience=Patience(first_wait_s=0)) == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pass@host/a.tar", "https://***@host/a.tar"),
        ("got 'https://host/a?X-Amz-Signature=abc&b=c'; fix", "got 'https://host/a?***'; fix"),
        ("s3://bucket/photo-?.jpg", "s3://bucket/photo-?.jpg"),
        ("s3://bucket/a@b.tar", "s3://bucket/a@b.tar"),
        ("{'secret': 'abc', 'aws_secret_access_key=abc'", "{'secret': '***', 'aws_secret_access_key=***'"),
        ("/data/a.tar", "/data/a.tar"),
    ],
)
def test_secrets_are_not_shown(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_errors_of_storage_show_no_secrets(tmp_path) -> None:
    with pytest.raises(UserError) as raised:
        storage.exists("s33://user:hunter2@bucket/x?key=hunter2")
    assert "hunter2" not in str(raised.value)
    assert raised.value.__cause__ is None

    def fail() -> BytesIO:
        raise PermissionError("https://host/a?sig=hunter2")

    with pytest.raises(PermissionError, match=r"https://host/a\?\*\*\*"):
        tried("https://host/a?sig=hunter2", fail)


def test_errors_that_people_read_show_no_logins() -> None:
    for kind in (UserError, StageError):
        assert str(kind("http://bob:hunter2@host/a: not there; max_tokens: got 3")) == "http://***@host/a: not there; max_tokens: got 3"


def test_errors_of_a_stores_client_become_those_of_files() -> None:
    def unreachable() -> None:
        raise EndpointConnectionError(endpoint_url="http://me:hunter2@127.0.0.1/x")

    def nobody() -> None:
        raise NoCredentialsError

    with pytest.raises(ConnectionError, match=r"http://\*\*\*@127"):
        tried("s3://bucket/x", unreachable, patience=Patience(tries=1))
    with pytest.raises(PermissionError, match="credentials"):
        tried("s3://bucket/x", nobody)


def test_what_may_pass_still_may_when_its_secrets_are_gone() -> None:
    def busy() -> None:
        raise OSError(errno.EBUSY, "slow down", "https://host/a?sig=hunter2")

    def cut_off() -> None:
        raise IncompleteRead(b"half of https://host/a?sig=hunter2")

    for fail in (busy, cut_off):
        with pytest.raises(ConnectionError) as raised:
            tried("https://host/a", fail, patience=Patience(tries=1))
        assert "hunter2" not in str(raised.value)
