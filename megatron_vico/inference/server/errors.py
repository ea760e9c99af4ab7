"""What a client is told when a request cannot be served, in OpenAI's shape."""

from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is no completion."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        """What was found, what was expected and the fix; `param` names the field."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The nested form, which the openai client reads."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": _TYPES.get(self.status, kind)}
        return {"error": error | {"param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, which clients honour."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {}
