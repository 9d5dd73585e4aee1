"""What the clients share; their answers are tested against a real server in front_door/test_calls.py."""

from __future__ import annotations

import inspect

from server import calls
from server.client import AdminClient, AsyncAdminClient, AsyncClient, Client


def test_both_transports_have_the_same_calls() -> None:
    for blocking, awaited, names in (
        (Client, AsyncClient, ("classify", "classify_tasks", "list_tasks", "get_task")),
        (AdminClient, AsyncAdminClient, ("status", "reload")),
    ):
        for name in names:
            call = getattr(calls, name)
            for method in (getattr(blocking, name), getattr(awaited, name)):
                assert method.__doc__ == call.__doc__
                assert inspect.signature(method) == inspect.signature(call)
                assert "Raises:" in method.__doc__
