"""What every command's request has in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_REQUEST_ID = 128


class Request(BaseModel):
    """Base of all requests: `request_id` comes back in the answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    request_id: Annotated[str, Field(max_length=MAX_REQUEST_ID)] | None = None
