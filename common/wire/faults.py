"""Our errors across gRPC: each has its status, and arrives as the same error on the other side."""

from __future__ import annotations

import json
from typing import Any

import grpc

from common import errors

METADATA_KEY = "cloister-error"
_KINDS = {
    kind.__name__: kind
    for kind in (errors.InvalidInput, errors.Refused, errors.LedgerCorrupt, errors.Unavailable, errors.CloisterError)
}
_BY_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Refused,
    grpc.StatusCode.PERMISSION_DENIED: errors.Refused,
    grpc.StatusCode.UNAUTHENTICATED: errors.Refused,
    grpc.StatusCode.DATA_LOSS: errors.LedgerCorrupt,
}


def status_of(error: errors.CloisterError) -> grpc.StatusCode:
    """The gRPC status that ``common/errors.py`` names."""
    return getattr(grpc.StatusCode, error.grpc_status)


def metadata_of(error: errors.CloisterError) -> tuple[tuple[str, str], ...]:
    """What is needed to raise the same error on the other side."""
    body: dict[str, Any] = {"kind": type(error).__name__}
    if isinstance(error, errors.BudgetExhausted):
        body |= {"client": error.client, "spent": error.spent, "asked": error.asked, "target": error.target}
    return ((METADATA_KEY, json.dumps(body)),)


def is_ours(call: grpc.RpcError) -> bool:
    """Whether the other side named the error; otherwise the transport did."""
    return any(key == METADATA_KEY for key, _ in call.trailing_metadata() or ())


def raised_by(call: grpc.RpcError) -> errors.CloisterError:
    """The error that the other side raised, or the nearest of ours to what the transport says."""
    status, details = call.code(), call.details() or "no details"
    found = next((value for key, value in call.trailing_metadata() or () if key == METADATA_KEY), None)
    if found is not None:
        try:
            body = json.loads(found)
            if body["kind"] == "BudgetExhausted":
                return errors.BudgetExhausted(
                    str(body["client"]),
                    spent=float(body["spent"]),
                    asked=float(body["asked"]),
                    target=float(body["target"]),
                )
            return _KINDS[body["kind"]](details)
        except (KeyError, TypeError, ValueError):
            pass
    return _BY_STATUS.get(status, errors.Unavailable)(f"{details} ({status.name})")
