"""What every command's request has in common."""

from datetime import datetime, timezone
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

MAX_REQUEST_ID = 128


def parse_time(text: str) -> datetime:
    """Read an RFC 3339 time in UTC (`Z`). Raises ValueError."""
    form = "%Y-%m-%dT%H:%M:%S.%fZ" if "." in text else "%Y-%m-%dT%H:%M:%SZ"
    return datetime.strptime(text, form).replace(tzinfo=timezone.utc)


def _check_time(text: str) -> str:
    try:
        parse_time(text)
    except ValueError:
        raise ValueError("must be a time in UTC like 2026-01-31T12:00:00.000Z") from None
    return text


class Request(BaseModel):
    """Base of all requests: `request_id` comes back in the answer; after `expires_at` it is not carried out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    request_id: Annotated[str, Field(max_length=MAX_REQUEST_ID)] | None = None
    expires_at: Annotated[str, Field(max_length=32), AfterValidator(_check_time)] | None = None


def explain(exc: ValidationError) -> str:
    """Every problem by its key, without what was sent: it may be anything."""
    problems = exc.errors(include_url=False, include_input=False)
    return "; ".join(
        f"{'.'.join(map(str, problem['loc']))[:64] or 'request'}: {problem['msg']}" for problem in problems
    )
