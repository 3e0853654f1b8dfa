"""Every error that Cloister raises on purpose, each with its exit code and gRPC status.

    CloisterError                 1  INTERNAL             something failed that has no better name
     ├─ InvalidInput              2  INVALID_ARGUMENT     a setting, a file or a record is wrong; also a ``ValueError``
     ├─ BudgetExhausted           4  RESOURCE_EXHAUSTED   the privacy budget does not allow what was asked
     ├─ Refused                   5  FAILED_PRECONDITION  a policy, a signature or a plan forbids it
     ├─ LedgerCorrupt             6  DATA_LOSS            a ledger, a certificate or a checkpoint does not verify
     ├─ Unavailable               7  UNAVAILABLE          a peer, a file or a service cannot be reached; try again
     └─ Interrupted             130  CANCELLED            the user stopped it

A class exists only where a caller acts differently on it. Exit code 3 is left free: shells and
container engines give it other meanings.

>>> BudgetExhausted("clinic-a", spent=2.5, asked=0.7, target=3.0).exit_code
4
"""

from __future__ import annotations


class CloisterError(Exception):
    """Base of all deliberate errors: the message says what was wrong and what to do."""

    exit_code: int = 1
    grpc_status: str = "INTERNAL"


class InvalidInput(CloisterError, ValueError):
    """A setting, a file or a record is not usable; the message names it and the range or the way out."""

    exit_code = 2
    grpc_status = "INVALID_ARGUMENT"


class BudgetExhausted(CloisterError):
    """What was asked for does not fit into the budget of ``client``; nothing was spent.

    Attributes:
        client: name of the organisation or data set whose budget it is.
        spent: ε certified for what has been charged already.
        asked: ε that would be reached if the request were granted (an upper bound; no unit).
        target: the budget's ε.
    """

    exit_code = 4
    grpc_status = "RESOURCE_EXHAUSTED"

    def __init__(self, client: str, *, spent: float, asked: float, target: float) -> None:
        self.client, self.spent, self.asked, self.target = client, spent, asked, target
        super().__init__(
            f"{client}: the budget of ε = {target:g} does not allow this: spent {spent:.4g}, "
            f"it would reach {asked:.4g}; left {max(0.0, target - spent):.4g}"
        )


class Refused(CloisterError):
    """A policy, a signature, a plan or a key forbids it; no record was read."""

    exit_code = 5
    grpc_status = "FAILED_PRECONDITION"


class LedgerCorrupt(CloisterError):
    """A ledger, a certificate or a checkpoint does not verify; nothing may be released on its word."""

    exit_code = 6
    grpc_status = "DATA_LOSS"


class Unavailable(CloisterError):
    """A peer, a service or a file cannot be reached now; trying again may help."""

    exit_code = 7
    grpc_status = "UNAVAILABLE"


class Interrupted(CloisterError):
    """The user stopped the command; what was finished is on disk and can be resumed."""

    exit_code = 130
    grpc_status = "CANCELLED"
