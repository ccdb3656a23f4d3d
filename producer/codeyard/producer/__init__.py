"""For backend services: submit code-generation jobs, poll or stream their results.

`AsyncClient` for asyncio programs, `Client` for blocking ones (Django, Flask, Celery). Errors are in
`codeyard.shared.errors`. Importing this loads no client library; a URL's scheme decides which is needed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codeyard.producer.async_client import AsyncClient, AsyncJob
    from codeyard.producer.client import Client, Job
    from codeyard.producer.submission import Submission

__all__ = ["AsyncClient", "AsyncJob", "Client", "Job", "Submission"]

_HOMES = {
    "AsyncClient": "async_client",
    "AsyncJob": "async_client",
    "Client": "client",
    "Job": "client",
    "Submission": "submission",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
