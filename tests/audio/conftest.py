"""Two servers on this machine, for tests of downloads."""

from collections.abc import Iterator

import pytest

from tests.support.answers import AnswerServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[AnswerServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = AnswerServer()
    yield served
    served.close()


@pytest.fixture
def other() -> Iterator[AnswerServer]:
    served = AnswerServer()
    yield served
    served.close()
