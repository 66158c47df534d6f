"""Requests to AWS and answers of its services, as they pass on the wire: read, written, and called by name.

Bodies are whole: stand-ins' are small.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Final
from urllib.parse import parse_qs, urlsplit

import msgspec

#: What S3 calls a request (botocore's model of S3): method, what its query holds, and the call's name; the
#: first that fits.
_OF_BUCKETS: Final = (
    ("GET", "list-type", "ListObjectsV2"),
    ("GET", "uploads", "ListMultipartUploads"),
    ("POST", "delete", "DeleteObjects"),
    ("HEAD", "", "HeadBucket"),
    ("PUT", "", "CreateBucket"),
)
_OF_KEYS: Final = (
    ("GET", "uploadId", "ListParts"),
    ("GET", "", "GetObject"),
    ("HEAD", "", "HeadObject"),
    ("POST", "uploads", "CreateMultipartUpload"),
    ("POST", "uploadId", "CompleteMultipartUpload"),
    ("PUT", "uploadId", "UploadPart"),
    ("PUT", "", "PutObject"),
    ("DELETE", "uploadId", "AbortMultipartUpload"),
    ("DELETE", "", "DeleteObject"),
)
#: How each service says that it is asked too often (botocore's service models).
_THROTTLES: Final = {
    "s3": (503, "SlowDown"),
    "sqs": (403, "RequestThrottled"),
    "dynamodb": (400, "ProvisionedThroughputExceededException"),
    "kinesis": (400, "ProvisionedThroughputExceededException"),
    "sns": (429, "Throttled"),
    "secretsmanager": (400, "ThrottlingException"),
}


class Request(msgspec.Struct):
    """One request as it arrived; header names are in lower case, the body is whole."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def call(self) -> str:
        """Service and operation as botocore names them: ``s3.GetObject``, ``dynamodb.PutItem``."""
        prefix, _, operation = self.headers.get("x-amz-target", "").partition(".")
        if operation:
            return f"{re.sub(r'^amazon|_.*$', '', prefix.lower())}.{operation}"
        signed = re.search(r"/([a-z0-9-]+)/aws4_request", self.headers.get("authorization", ""))
        service = signed[1] if signed else "s3"
        if service != "s3":  # the query protocol
            return f"{service}.{parse_qs(self.body.decode('latin-1')).get('Action', ['?'])[0]}"
        url = urlsplit(self.target)
        query = parse_qs(url.query, keep_blank_values=True)
        key = url.path.lstrip("/").partition("/")[2]
        fitting = (
            operation
            for method, name, operation in (_OF_KEYS if key else _OF_BUCKETS)
            if method == self.method and (not name or name in query)
        )
        return f"s3.{next(fitting, self.method)}"

    @property
    def text(self) -> str:
        """What rules look into: the target, the range asked for, and the body of a call that is no S3's."""
        body = self.body.decode("latin-1") if "x-amz-target" in self.headers else ""
        return f"{self.target}\n{self.headers.get('range', '')}\n{body}"


class Answer(msgspec.Struct):
    """One answer, whole; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


def error_answer(request: Request, status: int, code: str, message: str) -> Answer:
    """An error as the service that `request` is for would say it (none has a body for HEAD)."""
    if "x-amz-target" in request.headers:
        body = json.dumps({"__type": f"injected#{code}", "message": message}).encode()
        return Answer(status, {"content-type": request.headers.get("content-type", "")}, body)
    said = f"<Code>{code}</Code><Message>{message}</Message>"
    text = f"<Error>{said}</Error>"
    if not request.call.startswith("s3."):
        text = f"<ErrorResponse><Error><Type>Sender</Type>{said}</Error></ErrorResponse>"
    body = b"" if request.method == "HEAD" else text.encode()
    return Answer(status, {"content-type": "application/xml"}, body)


def throttle_answer(request: Request) -> Answer:
    """What the service that `request` is for says to who asks too often."""
    status, code = _THROTTLES[request.call.partition(".")[0]]
    return error_answer(request, status, code, "Slow down")


def head(first: str, headers: dict[str, str]) -> bytes:
    """The first line and the headers, as they are sent."""
    lines = [first, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    """The next request of a connection; a client that waits to be told to send its body is told so.

    Raises:
        IncompleteReadError, ConnectionError: there is none, or it breaks off.
    """
    first, headers = await _read_head(reader)
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    method, target, _ = first.split(" ", 2)
    return Request(method, target, headers, await _read_body(reader, headers, default=0))


async def read_answer(reader: asyncio.StreamReader, method: str) -> Answer:
    """The answer to a request by `method`; one that has no length ends with the connection.

    Raises:
        IncompleteReadError, ConnectionError: it breaks off.
    """
    status = 100
    headers: dict[str, str] = {}
    while status == 100:
        first, headers = await _read_head(reader)
        status = int(first.split(" ", 2)[1])
    bodiless = method == "HEAD" or status in (204, 304)
    return Answer(status, headers, b"" if bodiless else await _read_body(reader, headers, default=-1))


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines if line)
    return first, {name.lower(): value.strip() for name, _, value in fields}


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str], *, default: int) -> bytes:
    """The body; without a length, `default` bytes of it (-1: up to the connection's end)."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        length = int(headers.get("content-length", default))
        return await reader.read() if length < 0 else await reader.readexactly(length)
    body = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass  # trailers
    return bytes(body)
