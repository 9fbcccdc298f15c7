"""An S3 store that has nothing and notes what it is asked, for what two clients say of themselves."""

from collections.abc import Iterator
from contextlib import contextmanager

from helpers.answers import Answers, serving

LISTED = "<Contents><Key>{key}</Key><Size>3</Size><LastModified>2020-01-01T00:00:00.000Z</LastModified></Contents>"


class _Store(Answers):
    """Answers as a store that has nothing, and notes what it is asked."""

    protocol_version = "HTTP/1.1"  # else botocore waits a second for leave to send
    status, code = 200, ""
    keys: tuple[str, ...] = ()
    asked: list[tuple[str, str, str, str]]

    def answer(self) -> None:
        key = self.headers["Authorization"].partition("Credential=")[2].partition("/")[0]
        self.asked.append((self.command, self.path, self.headers["Host"], key))
        if self.command == "PUT":
            status = self.status if {"If-Match", "If-None-Match"} & set(self.headers) else 200
        else:
            status = 204 if self.command == "DELETE" else 404
        code = self.code if self.command == "PUT" else "NoSuchKey"
        body = f"<Error><Code>{code}</Code></Error>".encode() if status >= 300 else b""
        if self.keys and "list-type" in self.path:
            status, found = 200, "".join(LISTED.format(key=key) for key in self.keys)
            body = f"<ListBucketResult>{found}<KeyCount>{len(self.keys)}</KeyCount></ListBucketResult>".encode()
        self.say(status, body, ETag='"1"')


@contextmanager
def store(
    status: int = 200, code: str = "", keys: tuple[str, ...] = ()
) -> Iterator[tuple[str, list[tuple[str, str, str, str]]]]:
    asked: list[tuple[str, str, str, str]] = []
    handler = type("Store", (_Store,), {"status": status, "code": code, "asked": asked, "keys": keys})
    with serving(handler) as url:
        yield url, asked


KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
