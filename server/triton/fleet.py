"""Which Tritons there are, what each of them holds, and which of them may be asked what."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import logging
import threading
import time
from collections.abc import Collection, Iterable

from server.errors import EndpointError
from server.generation import Generation
from server.triton.counters import Counters
from server.triton.endpoint import Endpoint, segments_in
from server.triton.plans import HeldGeneration, Plan

_log = logging.getLogger(__name__)


class State(enum.Enum):
    """Of a Triton."""

    JOINING = "joining"
    """It is being brought to the generations that answer."""
    SERVING = "serving"
    """It answers."""
    DOWN = "down"
    """It does not answer, or not what it should."""


@dataclasses.dataclass(frozen=True, slots=True)
class EndpointReport:
    """What is to be said of a Triton.

    Attributes:
        address: HOST:PORT.
        state: whether it answers.
        since: when it came to be so, in UTC.
        reason: what is wrong with it; empty if nothing is.
        generations: numbers of the generations that it holds, ascending.
        rows_in_flight: rows that it has been asked and has not answered.
        version: of Triton; empty if it never answered.
    """

    address: str
    state: State
    since: dt.datetime
    reason: str
    generations: tuple[int, ...]
    rows_in_flight: int
    version: str


class Member:
    """A Triton as the engine sees it. Guarded by the fleet's lock, but for locks and what guards itself.

    Attributes:
        endpoint: calls it; guards itself.
        counters: what it ran; guard themselves.
        changing: held by whoever loads and unloads models there.
        probing: held while something is asked that is not to be counted.
        wake: set when there is something to do about it.
        state: whether it may be asked.
        life: counts how often what is known of it became void. An error of an earlier life says nothing of this one.
        holds: the generations that it answers.
        models: what was loaded there and answered as it should.
        faults: what is wrong with models that do not answer, by name. Whatever does not need them is still asked.
        num_rows: rows in flight.
        answered_seconds: when it last answered anything, on the clock of `time.monotonic`.
        proven: when each model last ran for an answer, on the same clock.
        version: of Triton.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.counters = Counters()
        self.changing = threading.Lock()
        self.probing = threading.Lock()
        self.wake = threading.Event()
        self.state = State.JOINING
        self.since = dt.datetime.now(dt.UTC)
        self.reason = ""
        self.life = 0
        self.holds: set[Generation] = set()
        self.models: set[str] = set()
        self.faults: dict[str, str] = {}
        self.num_rows = 0
        self.answered_seconds = 0.0
        self.proven: dict[str, float] = {}
        self.version = ""

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self.endpoint.address

    @property
    def trouble(self) -> str:
        """What is wrong with it, in words; empty if nothing is."""
        if self.state is not State.SERVING:
            return self.reason
        return "; ".join(f"{model}: {reason}" for model, reason in sorted(self.faults.items()))


class Fleet:
    """All Tritons of an engine and the generations that they are to hold. Its lock guards all that is here and in the members.

    Args:
        endpoints: calls the Tritons; at least one.
    """

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self.lock = threading.RLock()
        self.members = [Member(endpoint) for endpoint in endpoints]
        self.loaded: dict[Generation, HeldGeneration] = {}
        self.loading: HeldGeneration | None = None
        self.retiring: set[HeldGeneration] = set()
        self.followed: Generation | None = None
        self.known: set[str] = set()
        """Names of all models, and aliases, that a generation loaded here ever had."""

    def able(self, generation: Generation, plan: Plan, tried: Collection[tuple[Member, int]]) -> list[Member]:
        """Returns the members that may be asked a plan.

        Args:
            generation: that answers.
            plan: what is asked.
            tried: members, with their lives, that are not to be asked again.
        """
        return [
            member
            for member in self.members
            if member.state is State.SERVING
            and generation in member.holds
            and (member, member.life) not in tried
            and plan.models.isdisjoint(member.faults)
        ]

    def troubles(self) -> list[str]:
        """Returns for each member what is wrong with it."""
        with self.lock:
            return [f"{member.address} is {member.state.value}: {member.trouble or 'no reason known'}" for member in self.members]

    def reports(self) -> tuple[EndpointReport, ...]:
        """Returns what is to be said of each member."""
        with self.lock:
            return tuple(
                EndpointReport(
                    address=member.address,
                    state=member.state,
                    since=member.since,
                    reason=member.trouble,
                    generations=tuple(sorted(generation.number for generation in member.holds)),
                    rows_in_flight=member.num_rows,
                    version=member.version,
                )
                for member in self.members
            )

    def held(self) -> list[HeldGeneration]:
        """Returns every generation whose models must stay: that answers, is being loaded, or has questions open."""
        with self.lock:
            return [*self.loaded.values(), *self.retiring, *([self.loading] if self.loading else [])]

    def needed(self) -> frozenset[str]:
        """Returns the names of the models that must stay."""
        return frozenset().union(*(held.models for held in self.held()))

    def take_down(self, member: Member, reason: str, life: int | None = None) -> None:
        """Takes a member out until it has been brought to the generations that answer.

        Args:
            member: which.
            reason: what is wrong with it.
            life: the one that the reason is from; none means this one.
        """
        with self.lock:
            if life is not None and life != member.life:
                return
            if (member.state, member.reason) != (State.DOWN, reason):
                _log.warning("Triton at %s is out: %s", member.address, reason)
            if member.state is State.SERVING:
                member.wake.set()
            self._set_state(member, State.DOWN, reason)
            member.life += 1
            member.holds.clear()
            member.models.clear()
            member.faults.clear()
            member.proven.clear()

    def take_up(self, member: Member, also: HeldGeneration | None = None) -> bool:
        """Has a member answer, if it holds every generation that answers, and the other one.

        Returns:
            Whether it answers now.
        """
        with self.lock:
            wanted = [*self.loaded, *([also.generation] if also else [])]
            if not wanted or not member.holds.issuperset(wanted):
                return False
            if member.state is not State.SERVING:
                numbers = ", ".join(str(generation.number) for generation in wanted)
                _log.info("Triton %s at %s serves generation %s", member.version, member.address, numbers)
            self._set_state(member, State.SERVING, "")
            return True

    def blame(self, member: Member, error: EndpointError, plan: Plan, life: int) -> None:
        """Notes that a model of a member does not answer; whatever does not need it is still asked.

        Args:
            member: which.
            error: what it said.
            plan: what it was asked.
            life: its life when it was.
        """
        with self.lock:
            if life != member.life:
                return
            for model in segments_in(error.reason) & plan.models or {plan.ensemble}:
                if model not in member.faults:
                    _log.warning("%s at Triton %s does not answer: %s", model, member.address, error.reason)
                    member.wake.set()
                member.faults[model] = error.reason

    def mend(self, member: Member, models: Iterable[str]) -> None:
        """Notes that models of a member answer again."""
        with self.lock:
            member.life += 1
            for model in models:
                if member.faults.pop(model, None) is not None:
                    _log.info("%s at Triton %s answers again", model, member.address)

    def answered(self, member: Member, plan: Plan | None = None) -> None:
        """Notes that a member answered, and if it did as it should, whom it asked for that."""
        with self.lock:
            member.answered_seconds = time.monotonic()
            if plan is not None:
                for model in plan.models:
                    member.proven[model] = member.answered_seconds

    def _set_state(self, member: Member, state: State, reason: str) -> None:
        if member.state is not state:
            member.since = dt.datetime.now(dt.UTC)
        member.state, member.reason = state, reason
