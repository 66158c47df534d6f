"""``sns://arn:aws:sns:REGION:ACCOUNT:TOPIC``: notices to an SNS topic.

What SNS takes, by its own service model (botocore's ``sns`` 2010-03-31, ``PublishInput``): a subject of UTF-8
text without line breaks and control characters, shorter than 100 characters; a message of at most 262,144
bytes; on FIFO topics a group and a deduplication id of up to 128 alphanumeric characters and punctuation.
Subjects are kept to ASCII: mail servers on the way show others as they like.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Any, Final

from flowlane.errors import ConfigError
from flowlane.ports import Environment
from flowlane_aws.clients import asking, open_client

#: Characters of a subject, at most: SNS wants less than 100.
SUBJECT: Final = 99
#: Bytes of a text, at most: the limit is 256 KiB for the message, its attributes (which are short) included.
TEXT: Final = 256 * 1024 - 1024
CUT_NOTE: Final = "\n\n[cut here: the rest does not fit into one notice, `flowlane status` shows it]\n"
#: The message attribute by which a subscriber knows a notice that was sent again.
KEY_ATTRIBUTE: Final = "idempotency-key"

_ARN = re.compile(r"arn:aws[a-z0-9-]*:sns:([a-z0-9-]+):\d{12}:([A-Za-z0-9_-]{1,256}(?:\.fifo)?)")
#: Alphanumeric characters and punctuation: all of ASCII that shows, without the space.
_ID = re.compile(r"[!-~]{1,128}")
#: What XML 1.0 has no place for, and so neither have messages (of SQS, to which topics deliver).
_UNTOLD = re.compile("[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff]")


class Topic:
    """A topic as a ``ports.Notifier``: one publish for each notice."""

    def __init__(self, client: Any, arn: str) -> None:
        self._client = client
        self._arn = arn
        self._fifo = arn.endswith(".fifo")

    async def send(self, subject: str, text: str, *, idempotency_key: str) -> None:
        """See ``ports.Notifier``. A FIFO topic drops a notice sent again within five minutes; subscribers of
        others can tell by the message attribute ``idempotency-key``."""
        key = id_of(idempotency_key)
        request = {
            "TopicArn": self._arn,
            "Subject": subject_of(subject),
            "Message": text_of(text),
            "MessageAttributes": {KEY_ATTRIBUTE: {"DataType": "String", "StringValue": key}},
        }
        if self._fifo:
            # Notices of one lane arrive in order: keys begin with its name.
            request["MessageGroupId"] = id_of(idempotency_key.partition("/")[0])
            request["MessageDeduplicationId"] = key
        async with asking(f"publishing to {self._arn}"):
            await self._client.publish(**request)


def subject_of(subject: str) -> str:
    """`subject` as SNS takes it: one line of at most 99 characters, of ASCII, that begins with one that
    shows; others come out as escapes. Never empty."""
    line = " ".join(subject.split())
    line = line.encode("ascii", "backslashreplace").decode()
    line = "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in line) or "flowlane"
    return line if len(line) <= SUBJECT else f"{line[: SUBJECT - 3]}..."


def text_of(text: str) -> str:
    """`text` without control characters (but line ends and tabs), cut with a note where it is too long."""
    plain = _UNTOLD.sub("\ufffd", text[: TEXT + 1]) or " "
    encoded = plain.encode("utf-8", "replace")
    if len(encoded) <= TEXT:
        return encoded.decode()
    return encoded[: TEXT - len(CUT_NOTE)].decode("utf-8", "ignore") + CUT_NOTE


def id_of(key: str) -> str:
    """`key` as SNS takes ids, the same for the same key: as it is, or a digest of it."""
    if _ID.fullmatch(key):
        return key
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()


@asynccontextmanager
async def open_notifier(
    uri: str, environment: Environment, *, region: str = "", endpoint: str = ""
) -> AsyncIterator[Topic]:
    """The topic that `uri` names, in the region that its ARN names.

    Raises:
        ConfigError: `uri` holds no ARN of a topic.
    """
    arn = uri.removeprefix("sns://")
    known = _ARN.fullmatch(arn)
    if known is None:
        raise ConfigError(f"{uri} names no topic: write sns://arn:aws:sns:REGION:ACCOUNT:TOPIC")
    async with open_client("sns", region=region or known[1], endpoint=endpoint, connections=8) as client:
        yield Topic(client, arn)
