"""What every command's request has in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_REQUEST_ID = 128


class Request(BaseModel):
    """Base of all requests: `request_id` comes back in the answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    request_id: Annotated[str, Field(max_length=MAX_REQUEST_ID)] | None = None


def explain(exc: ValidationError) -> str:
    """Every problem by its key, without what was sent: it may be anything."""
    problems = exc.errors(include_url=False, include_input=False)
    return "; ".join(
        f"{'.'.join(map(str, problem['loc']))[:64] or 'request'}: {problem['msg']}" for problem in problems
    )
