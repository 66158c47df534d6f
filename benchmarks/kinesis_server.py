"""A responder that speaks as much of Kinesis as the benchmark needs: a process of its own, one stream.

``python -m benchmarks.kinesis_server SHARDS`` prints its port, and serves until it is killed. AWS JSON
protocol 1.1: POST / with ``X-Amz-Target: Kinesis_20131202.<operation>``. It takes everything at once, and
looks into it when somebody wants to know; what is read lies there as finished JSON: so what is measured
against it is who puts, or who reads. ``Bench.Taken``, which is nobody's operation but the benchmark's,
answers with the numbers of the records put since the last time, by key, in their order; ``Bench.Fill`` has
records lie there to be read.
"""

from __future__ import annotations

import asyncio
import json
import sys
from base64 import b64encode
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager
from hashlib import md5
from typing import Any

import msgspec

from benchmarks.responder import serve, started
from flowlane.streams import kpl
from flowlane.streams.aggregate import pack

SHARDS = 4
KEYS = 10_000
SIZE = 200
#: Hash keys are numbers of 128 bits.
_HASHES = 1 << 128


def serving(shards: int = SHARDS) -> AbstractContextManager[str]:
    """The endpoint of a running responder."""
    return started("kinesis_server", shards)


def record(number: int, keys: int = KEYS) -> tuple[str, bytes]:
    """Key and data of a record; its first ten bytes are its number."""
    return f"key-{number % keys:06}", b"%010d" % number + bytes(SIZE - 10)


class _Entry(msgspec.Struct):
    PartitionKey: str
    ExplicitHashKey: str = ""


class _Put(msgspec.Struct):
    Records: list[_Entry]


class _Whole(msgspec.Struct):
    PartitionKey: str
    Data: bytes


class _Kept(msgspec.Struct):
    Records: list[_Whole]


class Stream:
    """What was put, as it came, and what lies there to be read, as finished JSON."""

    def __init__(self, shards: int) -> None:
        self._starts = [number * _HASHES // shards for number in range(shards)]
        self._taken: list[bytes] = []
        self._lying: list[list[str]] = [[] for _ in range(shards)]
        self._answers: dict[int, bytes] = {}
        self._put = msgspec.json.Decoder(_Put)

    def answer(self, operation: str, body: bytes) -> bytes:
        """The answer's body."""
        if operation == "PutRecords":
            return self._take(body)
        asked: dict[str, Any] = json.loads(body)
        if operation == "GetRecords":
            return self._give(asked)
        said: Any = {
            "ListShards": self._shards,
            "DescribeStream": self._description,
            "GetShardIterator": self._iterator,
            "Taken": self._told,
            "Fill": self._fill,
        }[operation](asked)
        return json.dumps(said).encode()

    # ----------------------------------------------------------------- putting

    def _take(self, body: bytes) -> bytes:
        self._taken.append(body)
        entries = self._put.decode(body).Records
        if any(entry.ExplicitHashKey for entry in entries):
            return _results([self._shard_of(entry) for entry in entries])
        count = len(entries)  # of plain ones nobody is told the right shard: that would cost more than taking
        if count not in self._answers:
            self._answers[count] = _results([0] * count)
        return self._answers[count]

    def _shard_of(self, entry: _Entry) -> int:
        place = int(entry.ExplicitHashKey or hash_of(entry.PartitionKey))
        return bisect_right(self._starts, place) - 1

    def _told(self, asked: dict[str, Any]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        decoder = msgspec.json.Decoder(_Kept)
        for body in self._taken:
            for entry in decoder.decode(body).Records:
                packed = kpl.unpack(entry.Data)
                for key, data in (
                    [(entry.PartitionKey, entry.Data)]
                    if packed is None
                    else [(one.key, one.data) for one in packed]
                ):
                    found.setdefault(key, []).append(int(data[:10]))
        self._taken.clear()
        return found

    # ----------------------------------------------------------------- reading

    def _fill(self, asked: dict[str, Any]) -> dict[str, Any]:
        """As many records as ``asked``; ``Pack``: aggregated, so many at once."""
        rows: list[list[tuple[str, bytes]]] = [[] for _ in self._starts]
        for number in range(asked["Count"]):
            key, data = record(number)
            rows[bisect_right(self._starts, hash_of(key)) - 1].append((key, data))
        self._lying = [
            [
                _text(sequence, *each)
                for sequence, each in enumerate(some if not asked["Pack"] else _packs(some, asked["Pack"]))
            ]
            for some in rows
        ]
        return {}

    def _give(self, asked: dict[str, Any]) -> bytes:
        shard, _, at = asked["ShardIterator"].partition(":")
        lying = self._lying[int(shard)]
        page = lying[int(at) : int(at) + asked.get("Limit", 10_000)]
        end = int(at) + len(page)
        return (
            f'{{"Records":[{",".join(page)}],"NextShardIterator":"{shard}:{end}",'
            f'"MillisBehindLatest":{len(lying) - end}}}'
        ).encode()

    def _iterator(self, asked: dict[str, Any]) -> dict[str, Any]:
        at = 0
        if asked["ShardIteratorType"] in ("AT_SEQUENCE_NUMBER", "AFTER_SEQUENCE_NUMBER"):
            at = int(asked["StartingSequenceNumber"]) - _FIRST + asked["ShardIteratorType"].startswith("AF")
        return {"ShardIterator": f"{int(asked['ShardId'][-12:])}:{at}"}

    def _shards(self, asked: dict[str, Any]) -> dict[str, Any]:
        ends = [*self._starts[1:], _HASHES]
        return {
            "Shards": [
                {
                    "ShardId": f"shardId-{number:012}",
                    "HashKeyRange": {"StartingHashKey": str(start), "EndingHashKey": str(end - 1)},
                    "SequenceNumberRange": {"StartingSequenceNumber": str(_FIRST)},
                }
                for number, (start, end) in enumerate(zip(self._starts, ends, strict=True))
            ]
        }

    def _description(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"StreamDescription": {"StreamStatus": "ACTIVE", **self._shards(asked)}}


#: As long as Kinesis's own are.
_FIRST = 49598630142999655949899443842509554952738656579378741250


def hash_of(key: str) -> int:
    """Where Kinesis puts what has this partition key."""
    return int.from_bytes(md5(key.encode(), usedforsecurity=False).digest())


def _results(shards: list[int]) -> bytes:
    results = [{"SequenceNumber": str(_FIRST), "ShardId": f"shardId-{shard:012}"} for shard in shards]
    return json.dumps({"FailedRecordCount": 0, "Records": results}, separators=(",", ":")).encode()


def _text(sequence: int, key: str, data: bytes) -> str:
    return json.dumps(
        {
            "SequenceNumber": str(_FIRST + sequence),
            "ApproximateArrivalTimestamp": 1700000000.123,
            "Data": b64encode(data).decode(),
            "PartitionKey": key,
        },
        separators=(",", ":"),
    )


def _packs(rows: list[tuple[str, bytes]], count: int) -> Iterator[tuple[str, bytes]]:
    for at in range(0, len(rows), count):
        some = rows[at : at + count]
        yield "a", pack([key for key, _ in some], [data for _, data in some])


if __name__ == "__main__":
    asyncio.run(serve(Stream(int(sys.argv[1])).answer))
