"""Who is answered: no page of another site, no other name without a token, and none without the token."""

import asyncio

import httpx
import pytest

from mdl_toolkit.serving.app import Limits, Service, create_app

LIMITS = Limits(request_mb=1, audio_seconds=1, new_tokens=1)
CHATS, FORMS = "/v1/chat/completions", "/v1/audio/transcriptions"


def asked(method, address, headers, token=None, host="127.0.0.1", **sent):
    """What an application without a model answers."""

    async def ask():
        transport = httpx.ASGITransport(create_app(Service({}, LIMITS), token, host))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, address, headers=headers, **sent)

    return asyncio.run(ask())


def said(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:9000"},
    ],
)
def test_a_page_of_another_site_is_refused_whatever_it_sends(headers):
    form = {"files": {"file": ("a.wav", b"RIFF")}}
    assert "other sites" in said(asked("POST", FORMS, headers, **form), 403)
    assert "other sites" in said(asked("POST", CHATS, headers, json={}), 403)
    # A link to the page may be anywhere.
    assert asked("GET", "/", headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://127.0.0.1:8000"},
        # Of the page, behind a proxy with https.
        {"Origin": "https://voice.example", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_the_page_and_programs_are_answered(headers):
    assert asked("GET", "/v1/models", headers).status_code == 200
    assert said(asked("POST", FORMS, headers), 400).startswith("file: expected a recording")


def test_without_a_token_no_site_can_lead_its_own_name_here():
    for name in ("evil.example", "evil.example:8000", "localhost.evil.example", "[", ""):
        for address in ("/", "/health", "/v1/models"):
            assert "by that name" in said(asked("GET", address, {"Host": name}), 403)
    for name in ("127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "192.168.1.7:8000", "box:1"):
        assert asked("GET", "/v1/models", {"Host": name}, host="box").status_code == 200
    headers = {"Host": "voice.example", "Authorization": "Bearer geheimé".encode()}
    assert asked("GET", "/v1/models", headers, token="geheimé").status_code == 200


def test_a_token_is_checked_before_the_body_is_read():
    read = []

    async def body():
        read.append(1)
        yield b"{}"

    for address in (CHATS, FORMS):
        assert "Bearer TOKEN" in said(asked("POST", address, {}, token="s", content=body()), 401)
    assert read == []
