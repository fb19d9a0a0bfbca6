"""What does a cloud tell this machine about its end? Its metadata service is asked, one source a cloud.

AWS: instance metadata service version 2, `spot/instance-action` and the rebalance recommendation. Google: `preempted`,
which says that it begins and not when it ends. Azure: scheduled events, which may vanish again. What no answer comes to
says nothing: only an answer without a notice takes one back.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol, TypeVar

from concertina.elastic.notices import UNKNOWN_LEAD_S, Notice, Source

__all__ = ["ENDPOINTS", "NoAnswer", "NoticeSource", "find_sources", "this_cloud"]

ENDPOINTS: Mapping[Source, str] = {
    Source.AWS: "http://169.254.169.254",
    Source.GCP: "http://metadata.google.internal",
    Source.AZURE: "http://169.254.169.254",
}
_T = TypeVar("_T")
_ANSWER_S = 2.0
_AZURE_ANSWER_S = 150.0  # the first question of a machine may take two minutes
_TOKEN_TTL_S = 21600
_AZURE_ENDS = frozenset({"Preempt", "Terminate", "Redeploy", "Reboot"})  # `Freeze` is over after seconds
_DMI = Path("/sys/class/dmi/id")
_AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"


class NoAnswer(Exception):
    """The metadata service did not answer as it should; it may the next time."""


class NoticeSource(Protocol):
    """One place that knows. `poll` answers all that it says now, and raises NoAnswer."""

    source: Source

    def poll(self) -> list[Notice]: ...


class _Service:
    """A metadata service. Never through a proxy: it answers this machine only."""

    def __init__(self, endpoint: str, headers: Mapping[str, str] | None = None) -> None:
        self._endpoint, self._headers = endpoint.rstrip("/"), dict(headers or {})
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(
        self, path: str, bound_s: float = _ANSWER_S, *, method: str = "GET", headers: Mapping[str, str] | None = None
    ) -> str | None:
        """The answer; None where there is no such thing (404). Raises NoAnswer."""
        request = urllib.request.Request(
            f"{self._endpoint}{path}", headers={**self._headers, **(headers or {})}, method=method
        )
        try:
            with self._opener.open(request, timeout=bound_s) as answer:
                return str(answer.read(1 << 20).decode())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise NoAnswer(f"{request.full_url} answers {error.code}") from error
        except (OSError, ValueError, HTTPException) as error:
            raise NoAnswer(f"{request.full_url}: {error!r}") from error


class AwsMetadata:
    """EC2's, with a session token."""

    source = Source.AWS

    def __init__(self, endpoint: str) -> None:
        self._service = _Service(endpoint)
        self._token, self._token_ends_s = "", 0.0

    def poll(self) -> list[Notice]:
        action = self._ask("/latest/meta-data/spot/instance-action")
        if action is not None:
            return [_parsed(_aws_action, action)]
        hint = self._ask("/latest/meta-data/events/recommendations/rebalance")
        return [] if hint is None else [Notice(Source.AWS, 0.0, "rebalance recommendation", is_hint=True)]

    def _ask(self, path: str) -> str | None:
        if time.monotonic() > self._token_ends_s:
            ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)}
            token = self._service.ask("/latest/api/token", method="PUT", headers=ttl)
            if token is None:
                raise NoAnswer("no session token: the metadata service knows version 1 only")
            self._token, self._token_ends_s = token, time.monotonic() + _TOKEN_TTL_S / 2
        try:
            return self._service.ask(path, headers={"X-aws-ec2-metadata-token": self._token})
        except NoAnswer:
            self._token_ends_s = 0.0  # it may have forgotten the token
            raise


class GcpMetadata:
    """Google's. It does not say how long there is: 30 s from when it was first heard."""

    source = Source.GCP

    def __init__(self, endpoint: str) -> None:
        self._service = _Service(endpoint, {"Metadata-Flavor": "Google"})
        self._since_s: float | None = None

    def poll(self) -> list[Notice]:
        if self._service.ask("/computeMetadata/v1/instance/preempted") != "TRUE":
            self._since_s = None
            return []
        now = time.monotonic()
        self._since_s = now if self._since_s is None else self._since_s
        return [Notice(Source.GCP, self._since_s + UNKNOWN_LEAD_S - now, "preempted")]


class AzureMetadata:
    """Azure's scheduled events. They are those of the whole scale set: others' are passed over."""

    source = Source.AZURE

    def __init__(self, endpoint: str) -> None:
        self._service = _Service(endpoint, {"Metadata": "true"})
        self._name: str | None = None

    def poll(self) -> list[Notice]:
        bound_s = _AZURE_ANSWER_S if self._name is None else _ANSWER_S
        if self._name is None:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._name = (self._service.ask(path) or "").strip() or None
            if self._name is None:
                raise NoAnswer("no name of this machine: events of a whole scale set would be taken for its own")
        answer = self._service.ask("/metadata/scheduledevents?api-version=2020-07-01", bound_s)
        name = self._name
        return [] if answer is None else _parsed(lambda text: _azure_events(text, name), answer)


_SOURCES: Mapping[Source, Callable[[str], NoticeSource]] = {
    Source.AWS: AwsMetadata,
    Source.GCP: GcpMetadata,
    Source.AZURE: AzureMetadata,
}


def find_sources(wanted: str, endpoint: str | None = None) -> list[NoticeSource]:
    """Those of the cloud that is `wanted`: `none`, `auto` (the one this machine is in, as its firmware says: nothing is
    asked elsewhere), or a cloud's name. `endpoint` is where it answers, instead of where it usually does."""
    cloud = this_cloud() if wanted == "auto" else None if wanted == "none" else Source(wanted)
    return [] if cloud is None else [_SOURCES[cloud](endpoint or ENDPOINTS[cloud])]


def this_cloud(dmi: Path = _DMI) -> Source | None:
    """In which cloud this machine is; None where its firmware names none of them."""
    if _read(dmi / "chassis_asset_tag") == _AZURE_TAG:  # the vendor alone would be any Hyper-V
        return Source.AZURE
    vendor = f"{_read(dmi / 'sys_vendor')} {_read(dmi / 'bios_vendor')}"
    return Source.AWS if "Amazon EC2" in vendor else Source.GCP if "Google" in vendor else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _parsed(parse: Callable[[str], _T], answer: str) -> _T:
    try:
        return parse(answer)
    except (KeyError, TypeError, ValueError) as error:
        raise NoAnswer(f"{answer[:200]!r} is not understood: {error!r}") from error


def _aws_action(answer: str) -> Notice:
    """`{"action": "terminate", "time": "2017-09-18T08:22:00Z"}`"""
    found = json.loads(answer)
    at = datetime.fromisoformat(found["time"])
    return Notice(Source.AWS, _left_s(at), str(found["action"]))


def _azure_events(answer: str, name: str) -> list[Notice]:
    """`{"Events": [{"EventType": "Preempt", "Resources": ["vm_0"], "NotBefore": "Mon, 19 Sep 2016 18:29:47 GMT"}]}`;
    one that has started has no time any more."""
    notices = []
    for event in json.loads(answer)["Events"]:
        kind = event["EventType"]
        if kind in _AZURE_ENDS and name in event["Resources"]:
            not_before = event.get("NotBefore") or ""
            left_s = _left_s(parsedate_to_datetime(not_before)) if not_before else 0.0
            notices.append(Notice(Source.AZURE, left_s, kind.lower()))
    return notices


def _left_s(at: datetime) -> float:
    """From now, by this machine's clock; a time without a zone is UTC, as the clouds mean it."""
    aware: Any = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return max(0.0, float((aware - datetime.now(UTC)).total_seconds()))
