"""An SQS event source mapping, as Lambda runs one: it receives from queues, invokes a function with what
came, and deletes what the answer does not name (Lambda developer guide, "Using Lambda with Amazon SQS")."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.aws_lambda.runtime_api import FunctionError


class QueueMapping:
    """A thread that feeds `invoke` (of a ``RuntimeApi``) from the queues whose names begin with `prefix`, in
    batches of up to `batch`, while the context is open. What the function raises leaves the batch in its
    queue: its visibility timeout ends some time."""

    def __init__(
        self,
        invoke: Callable[[], Callable[..., Any]],
        environment: Mapping[str, str],
        prefix: str,
        *,
        batch: int = 10,
        seconds: float = 10.0,
    ) -> None:
        self._invoke, self._environment, self._prefix = invoke, environment, prefix
        self._batch, self._seconds = batch, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mapping")
        self.invocations = 0
        self.messages = 0
        self.failed = 0  #: invocations that ended without an answer

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        session = botocore.session.get_session()
        sqs: Any = session.create_client(
            "sqs",
            region_name=self._environment["AWS_REGION"],
            endpoint_url=self._environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=self._environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self._environment["AWS_SECRET_ACCESS_KEY"],
            config=Config(connect_timeout=5, read_timeout=30),
        )
        urls: Sequence[str] = ()
        while not self._stop.is_set():
            with suppress(BotoCoreError, ClientError):  # a stand-in under load: asked again
                urls = urls or sqs.list_queues(QueueNamePrefix=self._prefix).get("QueueUrls", ())
                for url in urls:
                    if "-dead" not in url and not self._stop.is_set():
                        self._poll(sqs, url)

    def _poll(self, sqs: Any, url: str) -> None:
        got = sqs.receive_message(
            QueueUrl=url,
            MaxNumberOfMessages=self._batch,
            WaitTimeSeconds=0,
            MessageSystemAttributeNames=["All"],
            MessageAttributeNames=["All"],
        ).get("Messages", [])
        if not got:
            self._stop.wait(0.05)
            return
        name = url.rpartition("/")[2]
        arn = f"arn:aws:sqs:{self._environment['AWS_REGION']}:000000000000:{name}"
        self.invocations += 1
        self.messages += len(got)
        try:
            answer = self._invoke()({"Records": [_record(m, arn) for m in got]}, seconds=self._seconds)
        except (FunctionError, OSError):
            self.failed += 1
            return
        again = {item["itemIdentifier"] for item in (answer or {}).get("batchItemFailures", [])}
        assert again <= {message["MessageId"] for message in got}, "an identifier that is not in the batch"
        done = [message for message in got if message["MessageId"] not in again]
        if done:
            entries = [{"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(done)]
            sqs.delete_message_batch(QueueUrl=url, Entries=entries)


def _record(message: Mapping[str, Any], arn: str) -> dict[str, Any]:
    attributes = {
        name: {
            "dataType": value["DataType"],
            "stringValue": value.get("StringValue"),
            "stringListValues": [],
            "binaryListValues": [],
        }
        for name, value in message.get("MessageAttributes", {}).items()
    }
    return {
        "messageId": message["MessageId"],
        "receiptHandle": message["ReceiptHandle"],
        "body": message["Body"],
        "attributes": message.get("Attributes", {}),
        "messageAttributes": attributes,
        "md5OfBody": message.get("MD5OfBody", ""),
        "eventSource": "aws:sqs",
        "eventSourceARN": arn,
        "awsRegion": arn.split(":")[3],
    }
