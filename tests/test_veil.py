"""Secrets that the process knows stand in no text that leaves it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from time import process_time
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane import Policy, veil
from flowlane.cli.logs import logging_to_stderr
from flowlane.cli.session import Session
from flowlane.errors import ConfigError
from flowlane.settings import Settings
from flowlane.veil import HIDDEN, SHORTEST, conceal, concealing, remember

SECRET = 'can"ary/of the\nveil'


@pytest.fixture(autouse=True)
def _unveiled() -> Iterator[None]:
    """Each test begins with a process that knows no secret; a fixture of hypothesis's, so by hand."""
    before = dict(veil._known)
    veil._known.clear()
    yield
    veil._known.clear()
    veil._known.update(before)


def test_a_text_without_secrets_is_itself() -> None:
    text = "nothing here"
    assert conceal(text) is text
    remember(SECRET)
    assert conceal(text) == text


@pytest.mark.parametrize(
    "spelled",
    [
        SECRET,
        SECRET.replace("\n", " "),
        quote(SECRET),
        quote(SECRET, safe=""),
        quote_plus(SECRET),
        json.dumps(SECRET),
        repr(SECRET),
        repr({"password": SECRET}),
        f"https://user:{quote(SECRET, safe='')}@host/",
        json.dumps({"a": [SECRET, SECRET]}),
    ],
)
def test_a_secret_is_hidden_however_it_is_spelled(spelled: str) -> None:
    remember(SECRET)
    shown = conceal(f"before {spelled} after")
    assert "ary" not in shown
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    assert HIDDEN in shown


@given(st.lists(st.text(min_size=SHORTEST), min_size=1, max_size=4), st.text(), st.data())
def test_no_secret_is_left_in_any_text(secrets: list[str], text: str, data: st.DataObject) -> None:
    for secret in secrets:
        remember(secret)
    pieces = data.draw(st.lists(st.sampled_from([*secrets, text]), max_size=8))
    shown = conceal("|".join(pieces))
    assert not [secret for secret in secrets if secret in shown and set(secret) != {"*"}]


def test_the_longer_of_two_secrets_is_hidden_whole() -> None:
    remember("canary")
    remember("canary-and-more")
    assert conceal("canary-and-more, canary") == "***, ***"


@pytest.mark.parametrize("cut", [12, 20, 40])
def test_what_is_left_of_a_secret_that_was_cut_is_hidden(cut: int) -> None:
    remember("canary" * 10)
    remember("https://" + "hooks.example/canary" * 3)
    for secret in ("canary" * 10, "hooks.example/canary" * 3):
        assert conceal(f"bad value '{secret[:cut]}' given") == "bad value '***' given"
        assert conceal(f"bad value {secret[:cut]}") == "bad value ***"
    assert conceal("https://hooks.else/ and canary") == "https://hooks.else/ and canary"


def test_what_is_too_short_to_be_a_secret_hides_no_word() -> None:
    for value in ("", "a", "x" * (SHORTEST - 1)):
        remember(value)
    assert conceal("a xxxxx x") == "a xxxxx x"


def test_what_is_known_is_bounded() -> None:
    for n in range(3000):
        remember(f"secret-number-{n:05}")
    assert len(veil._known) == 1024
    assert conceal("secret-number-02999") == HIDDEN


def test_a_thousand_secrets_keep_nobody_from_the_loop() -> None:
    """Nothing is compiled of all of them, not for one that is new, either: that took 50 ms each time."""
    text = "some/unit/2024-01-01T00: the server said 503, try again later; " * 16
    began = process_time()
    for n in range(1024):
        remember(f"{n:05}-of-many-secrets")
        if n % 50 == 0:
            conceal(text)
    assert conceal(f"{text}01023-of-many-secrets") == f"{text}{HIDDEN}"
    assert process_time() - began < 0.25


def test_secrets_that_come_while_others_are_hidden() -> None:
    """Threads write log lines while the loop resolves secrets: here one comes with every look at the text."""

    class Text(str):
        __slots__ = ()

        def __contains__(self, head: str) -> bool:  # type: ignore[override]  # as it is asked
            remember(f"{len(veil._known):05}-of-many-secrets")
            return super().__contains__(head)

    remember("the-first-of-all")
    assert conceal(Text("a line with the-first-of-all in it")) == f"a line with {HIDDEN} in it"
    assert len(veil._known) > 1


# --------------------------------------------------------------------------- logs


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_no_line_on_stderr_shows_a_secret(
    capsys: pytest.CaptureFixture[str], as_json: bool, debug: bool
) -> None:
    """Neither flowlane's nor anybody else's, message or traceback."""
    remember(SECRET)
    with logging_to_stderr("debug", as_json=as_json, debug=debug):
        for name in ("flowlane", "somebody.elses"):
            logger = logging.getLogger(name)
            logger.warning("it said %s", SECRET)
            try:
                raise OSError(5, SECRET) from ValueError(f"?password={quote(SECRET)}")
            except OSError:
                logger.exception("it broke")
    said = capsys.readouterr().err
    assert said.count("it broke") == 2
    assert said.count("OSError") >= 2
    assert "ary" not in said


def test_whoever_formats_flowlanes_records_gets_none() -> None:
    """A handler of Lambda's, or of an application that flowlane is part of: with its own formatter."""
    remember(SECRET)
    out = io.StringIO()
    logger = logging.getLogger("flowlane")
    handler = logging.StreamHandler(out)
    logger.addHandler(handler)
    try:
        with concealing(logger):
            logger.error("it said %s", SECRET)
            try:
                raise ConfigError(f"bad {SECRET}") from KeyError(SECRET)
            except ConfigError:
                logger.exception("it broke")
            try:
                raise ConfigError("nothing secret")
            except ConfigError:
                logger.exception("as always")
    finally:
        logger.removeHandler(handler)
    said = out.getvalue()
    assert "ary" not in said
    assert "it broke: ConfigError: bad ***\nKeyError: '***'\n\nThe above exception was" in said
    assert "\nflowlane.errors.ConfigError: bad ***\nas always\n" in said
    assert "ConfigError: nothing secret" in said
    assert logger.filters == []


def test_a_record_whose_arguments_do_not_fit_fails_nobody(caplog: pytest.LogCaptureFixture) -> None:
    remember(SECRET)
    logger = logging.getLogger("flowlane")
    with concealing(logger):
        logger.warning("it said %d of %s", SECRET)  # noqa: PLE1206  # that is the case
    (record,) = caplog.records
    assert record.getMessage() == "it said %d of %s % ('***',)"


# --------------------------------------------------------------------------- the command line, and reprs


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--debug"], ["--json", "--debug"]])
def test_no_error_of_the_command_line_shows_a_secret(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    remember(SECRET)
    for kind in (ConfigError, ValueError):
        session = Session(arguments)
        with pytest.raises(kind) as caught:
            raise kind(f"bad {SECRET}") from OSError(5, SECRET)
        assert session.fail(caught.value)
    shown = capsys.readouterr()
    assert shown.err.count("***") >= 2
    assert "ary" not in shown.out + shown.err


def test_what_holds_uris_shows_them_without_what_may_be_secret() -> None:
    backend = "sqlite://user:canary@host/x.db?password=canary"
    settings = Settings(backend=backend)
    assert repr(settings) == (
        "Settings(backend='sqlite://host/x.db', lane='', stage='', log_level='warning', "
        "allow_private_hosts=False)"
    )
    policy = Policy(notify="smtp://u:canary@h", quarantine="s3://b/?secret=canary")
    assert "canary" not in repr(policy)
    assert "canary" not in f"{settings} {policy}"
