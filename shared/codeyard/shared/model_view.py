"""What people see of an alias: what it points to, who serves it, where its rollout is.

Called by: `codeyard models`, the gateway's admin routes.
"""

from collections.abc import Sequence
from typing import Any

from codeyard.shared.alias import Alias
from codeyard.shared.notice import Notice, reports_of
from codeyard.shared.rollout import Readiness, waits_for


def model_view(alias: Alias, notices: Sequence[Notice]) -> dict[str, Any]:
    """A JSON document. `notices` is what the live workers told last."""
    workers = [
        {"worker": notice.owner, "revision": one.revision, "tier": one.tier, "serving": one.serving}
        for notice in notices
        for one in notice.models
        if one.alias == alias.name.partition("@")[0]
    ]
    view: dict[str, Any] = {"alias": alias.name, "revision": alias.revision, "workers": workers}
    if alias.context_tokens is not None:
        view["context_tokens"] = alias.context_tokens
    if (rollout := alias.rollout) is not None:
        reports = reports_of(notices, alias.name)
        view["rollout"] = {
            "phase": rollout.phase.value,
            "old": rollout.old.revision,
            "new": rollout.new.revision if rollout.new else None,
            "location": rollout.location,
            "percent": rollout.percent,
            "reason": rollout.reason,
            "ready": [name for name, told in reports.items() if told and told.readiness is Readiness.READY],
            "waits_for": waits_for(alias, reports),
        }
    return view
