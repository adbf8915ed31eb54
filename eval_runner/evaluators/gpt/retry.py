"""What went wrong with a request, whether it is tried again, and how long that waits."""

from __future__ import annotations

import email.utils
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
"""Between two tries of a request, unless the service asks for more."""
PATIENCE_S = 600.0
"""A service that asks to wait longer is left to a later attempt of the evaluation."""
_BUSY = (408, 409, 425, 429)
_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_FILTERED = ("content_filter", "content_policy_violation")
_STRUCTURED = re.compile(r"response_format|json_schema|structured.?output|guided", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """A request without a usable answer.

    `status` is HTTP's, None where there was no answer or a broken one; `code` and `parameter` are from OpenAI's error
    objects. `wait` is what the service asks for, in seconds. `charged` is whether it may cost something: an answer that
    was lost may, a refusal does not.
    """

    message: str
    status: int | None = None
    code: str = ""
    parameter: str = ""
    wait: float | None = None
    charged: bool = False

    @property
    def no_quota(self) -> bool:
        """Whether the account has nothing left, which waiting does not mend."""
        return self.code in _QUOTA

    @property
    def again(self) -> bool:
        """Whether another try may mend it."""
        return not self.no_quota and (self.status is None or self.status in _BUSY or self.status >= 500)

    @property
    def filtered(self) -> bool:
        """Whether the service refuses what the prompt says, and not how it was asked."""
        return self.status == 400 and self.code in _FILTERED

    def renamed(self, body: Mapping[str, Any]) -> bool:
        """Whether `max_tokens` must be called `max_completion_tokens`."""
        return self.status in (400, 422) and "max_tokens" in body and "max_completion_tokens" in self.message

    def refuses(self, body: Mapping[str, Any]) -> str:
        """The parameter of `body` that is refused; "" where that is not what is wrong."""
        if self.status not in (400, 422, 501):
            return ""
        if (named := re.split(r"[.\[]", self.parameter)[0]) in body and named not in ("messages", "model", "prompt"):
            return named
        if "response_format" in body and _STRUCTURED.search(self.message):
            return "response_format"
        if "temperature" in body and re.search(r"\btemperature\b", self.message):
            return "temperature"
        return ""


def back_off(tries: int) -> float:
    """Seconds to wait after so many tries: doubled each time, and between half and the whole of it, so that those who
    failed together do not come back together."""
    return float(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1)) * random.uniform(0.5, 1.0))


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the headers ask to wait: `retry-after-ms`, else `Retry-After` in seconds or as a date (RFC 9110,
    10.2.3); None without one that can be read."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        then = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, TypeError, IndexError):
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())
