"""Which run an outer event opens."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowlane.aws_lambda.wanted import Start, understand
from flowlane.cli.event import read_event
from flowlane.errors import ConfigError

SCHEDULED = {
    "detail-type": "Scheduled Event",
    "source": "aws.events",
    "time": "2024-01-01T00:00:00Z",
    "id": "53dc4d37",
}


def given(path: Path, value: Any) -> str:
    path.write_bytes(msgspec.json.encode(value))
    return read_event(str(path)).slot


def test_a_cloud_event_is_named_by_source_and_id(tmp_path: Path) -> None:
    file = tmp_path / "event.json"
    event = {"specversion": "1.0", "source": "shop", "id": "7", "type": "order", "extra": [1]}
    assert given(file, event) == "shop,7"
    assert read_event(str(file)).value == event
    assert given(file, {**event, "source": "other"}) != "shop,7"


def test_the_lambda_handler_gives_the_same_event_the_same_slot(tmp_path: Path) -> None:
    for event in (SCHEDULED, {"specversion": "1.0", "source": "a/b c", "id": "é,1", "type": "t"}):
        (wanted,) = understand(msgspec.json.encode(event), "lane")
        assert isinstance(wanted, Start)
        assert given(tmp_path / "event.json", event) == wanted.slot


def test_any_other_object_is_named_by_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "event.json"
    first = given(file, {"Records": [{"body": "x"}]})
    assert first == given(file, {"Records": [{"body": "x"}]})
    assert first != given(file, {"Records": [{"body": "y"}]})
    assert first.startswith("blake2b-")


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe", b'{"a": NaN}', b"{} {}", b'"text"', b"null"])
def test_what_is_no_json_object(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "event.json"
    file.write_bytes(raw)
    with pytest.raises(ConfigError, match="give one JSON object"):
        read_event(str(file))
