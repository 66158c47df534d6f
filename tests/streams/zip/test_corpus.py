"""Every archive of the corpus, against CPython's zipfile and against what docs/zip.md says is refused."""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowlane import FlowlaneError, ZipLimits
from flowlane.errors import Damaged, Refused
from flowlane.streams.zip.checks import refuse
from flowlane.streams.zip.entry import Entry
from flowlane.streams.zip.member import Member
from tests.streams.zip.making import read

PAGE = (Path(__file__).parents[3] / "docs" / "zip.md").read_text()

#: How the archives of the corpus that are encrypted were, as their makers' own tests say.
PASSWORDS = {
    "stream_unzip/7z_17_4_password_data_descriptor.zip": "password",
    "stream_unzip/7za_17_4_aes.zip": "password",
    "stream_unzip/7za_17_4_aes_data_descriptor.zip": "password",
    "stream_unzip/infozip_3_0_password.zip": "password",
    "stream_unzip/infozip_3_0_password_data_descriptor.zip": "password",
    "zip_rs/aes_archive.zip": "helloworld",
}


@pytest.fixture
def corpus() -> Path:
    folder = os.environ.get("FLOWLANE_CORPUS")
    if not folder:
        pytest.skip("FLOWLANE_CORPUS is not set: it names the folder with zip/ in it")
    return Path(folder) / "zip"


def files(corpus: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    for file in json.loads((corpus / "MANIFEST.json").read_text())["files"]:
        yield file, (corpus / file["file"]).read_bytes()


def content(data: bytes, entry: Entry, password: str | None = None) -> bytes:
    """The member, fed a few bytes at a time."""
    refuse(entry, ZipLimits(), password=password)
    member = Member(entry, password=password)
    packed = data[entry.offset : entry.limit]
    found = b"".join(piece for at in range(0, len(packed), 61) for piece in member.feed(packed[at : at + 61]))
    member.close()
    return found


def refusals() -> set[tuple[str, int]]:
    """The table of docs/zip.md: members that CPython's zipfile reads and flowlane refuses."""
    table = PAGE.split("## What zipfile reads and flowlane does not")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([\d, ]+) \| (.+) \|$", table, re.MULTILINE)
    assert rows
    assert all(len(reason) > 10 for _, _, reason in rows)
    return {(name, int(index)) for name, indexes, _ in rows for index in indexes.split(",")}


def test_what_zipfile_reads_is_read_alike_but_for_the_refusals_of_the_page(corpus: Path) -> None:
    refused, members = set(), 0
    for file, data in files(corpus):
        if file["cpython"] != "opened":
            continue
        name = file["file"]
        entries = read(data)
        listed = file.get("entries", [])
        # What made the manifest ends a name at a NUL.
        assert [entry.name.partition("\0")[0] for entry in entries] == [each["name"] for each in listed], name
        with zipfile.ZipFile(corpus / name) as opened:
            for entry, info, each in zip(entries, opened.infolist(), listed, strict=True):
                if "error" in each:
                    continue
                try:
                    found = content(data, entry)
                except Refused:
                    refused.add((name, entry.index))
                    continue
                assert found == opened.read(info), (name, entry)
                assert (len(found), zlib.crc32(found)) == (each["ok"], int(each["crc"], 16)), (name, entry)
                members += 1
    assert refused == refusals()
    assert members == 78


def test_what_zipfile_does_not_read_is_read_or_refused_by_a_typed_error(corpus: Path) -> None:
    read_all, told = [], []
    for file, data in files(corpus):
        try:
            entries = read(data)
        except Damaged as error:
            assert file["cpython"] != "opened"
            told.append(str(error))
            continue
        for entry, each in zip(entries, file.get("entries", [{"error": ""}] * len(entries)), strict=True):
            if "error" not in each:
                continue
            try:
                found = content(data, entry, PASSWORDS.get(file["file"]))
            except FlowlaneError as error:
                told.append(str(error))
                continue
            assert len(found) == entry.size
            assert entry.aes_version == 2 or zlib.crc32(found) == entry.crc
            read_all.append(f"{file['file']} {entry.index}")
    assert not [text for text in told if "\n" in text]
    encrypted = {name.partition(" ")[0] for name in read_all} & set(PASSWORDS)
    assert encrypted == set(PASSWORDS)
    assert "stream_unzip/7za_17_4_deflate64.zip 0" in read_all
    assert "zip_rs/extended_timestamp_bad.zip 0" in read_all  # beside the member with the bad field
    assert len(read_all) + len(told) > 30


def test_without_a_password_an_encrypted_member_is_refused(corpus: Path) -> None:
    for file, data in files(corpus):
        if file["file"] in PASSWORDS:
            for entry in read(data):
                with pytest.raises(Refused, match="encrypted: give its password"):
                    content(data, entry)


def test_a_wrong_password_is_told(corpus: Path) -> None:
    for name in PASSWORDS:
        data = (corpus / name).read_bytes()
        for entry in read(data):
            with pytest.raises((Refused, Damaged), match="password"):
                content(data, entry, "wrong")
