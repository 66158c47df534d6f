"""A stand-in for one Kinesis stream that holds a million records and can split its shards.

``python -m tests.kills.stream_server SHARDS`` prints its port and serves until it is killed. Kinesalite has
a page of so many records ready after minutes only, and MiniStack forgets a shard that is split, with what
nobody has read of it. A closed shard can be read to its end here, which says so (GetRecords:
``NextShardIterator`` is null), and names its parents (ListShards); a record goes where its key's MD5 belongs.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import md5
from typing import Any, Final

import msgspec

from benchmarks.responder import serve

_HASHES: Final = 1 << 128
_FIRST: Final = 49598630142999655949899443842509554952738656579378741250
_PAGE: Final = 5_000  # records in an answer, at most


class _Entry(msgspec.Struct):
    Data: str
    PartitionKey: str
    ExplicitHashKey: str = ""


class _Put(msgspec.Struct):
    Records: list[_Entry]


class _Shard:
    def __init__(self, number: int, start: int, end: int, parent: str = "") -> None:
        self.id = f"shardId-{number:012}"
        self.start, self.end, self.parent = start, end, parent
        self.sequences: list[int] = []
        self.records: list[str] = []  # as they stand in answers
        self.closed = False


class Stream:
    """What was put, by shard."""

    def __init__(self, shards: int) -> None:
        self._shards: dict[str, _Shard] = {}
        self._number = _FIRST
        for number in range(shards):
            self._add(number * _HASHES // shards, (number + 1) * _HASHES // shards - 1)
        self._decode = msgspec.json.Decoder(_Put).decode

    def _add(self, start: int, end: int, parent: str = "") -> None:
        shard = _Shard(len(self._shards), start, end, parent)
        self._shards[shard.id] = shard
        self._open = sorted((one for one in self._shards.values() if not one.closed), key=_start)
        self._starts = [one.start for one in self._open]

    def answer(self, operation: str, body: bytes) -> bytes:
        """The answer's body."""
        if operation == "PutRecords":
            return self._put(body)
        asked: dict[str, Any] = json.loads(body)
        if operation == "GetRecords":
            return self._page(asked)
        said = {"ListShards": self._list, "GetShardIterator": self._iterator, "SplitShard": self._split}
        return json.dumps(said[operation](asked)).encode()

    def _put(self, body: bytes) -> bytes:
        results = []
        for entry in self._decode(body).Records:
            digest = md5(entry.PartitionKey.encode(), usedforsecurity=False).digest()
            place = int(entry.ExplicitHashKey or int.from_bytes(digest))
            shard = self._open[bisect_right(self._starts, place) - 1]
            self._number += 1
            shard.sequences.append(self._number)
            shard.records.append(
                f'{{"SequenceNumber":"{self._number}","PartitionKey":{json.dumps(entry.PartitionKey)},'
                f'"ApproximateArrivalTimestamp":1.0,"Data":"{entry.Data}"}}'
            )
            results.append(f'{{"SequenceNumber":"{self._number}","ShardId":"{shard.id}"}}')
        return f'{{"FailedRecordCount":0,"Records":[{",".join(results)}]}}'.encode()

    def _page(self, asked: dict[str, Any]) -> bytes:
        name, _, at = asked["ShardIterator"].partition(":")
        shard = self._shards[name]
        begin = int(at)
        page = shard.records[begin : begin + min(asked.get("Limit", _PAGE), _PAGE)]
        end = begin + len(page)
        rest = len(shard.records) - end
        following = "null" if shard.closed and not rest else f'"{name}:{end}"'
        return (
            f'{{"Records":[{",".join(page)}],"NextShardIterator":{following},"MillisBehindLatest":{rest}}}'
        ).encode()

    def _iterator(self, asked: dict[str, Any]) -> dict[str, Any]:
        shard = self._shards[asked["ShardId"]]
        at = 0
        if (sequence := asked.get("StartingSequenceNumber")) is not None:
            after = asked["ShardIteratorType"] == "AFTER_SEQUENCE_NUMBER"
            at = bisect_right(shard.sequences, int(sequence) if after else int(sequence) - 1)
        return {"ShardIterator": f"{shard.id}:{at}"}

    def _list(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {
            "Shards": [
                {
                    "ShardId": one.id,
                    "HashKeyRange": {"StartingHashKey": str(one.start), "EndingHashKey": str(one.end)},
                    "SequenceNumberRange": {"StartingSequenceNumber": str(_FIRST)},
                    **({"ParentShardId": one.parent} if one.parent else {}),
                }
                for one in self._shards.values()
            ]
        }

    def _split(self, asked: dict[str, Any]) -> dict[str, Any]:
        parent, middle = self._shards[asked["ShardToSplit"]], int(asked["NewStartingHashKey"])
        parent.closed = True
        self._add(parent.start, middle - 1, parent.id)
        self._add(middle, parent.end, parent.id)
        return {}


def _start(shard: _Shard) -> int:
    return shard.start


@contextmanager
def streaming(shards: int) -> Iterator[str]:
    """The endpoint of a running stand-in."""
    command = [sys.executable, "-m", "tests.kills.stream_server", str(shards)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


if __name__ == "__main__":
    asyncio.run(serve(Stream(int(sys.argv[1])).answer))
