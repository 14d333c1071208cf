"""An error of ours on its way from one process to another: its type as data, by the code that each class declares."""

from __future__ import annotations

from beringia.errors import BeringiaError, CheckpointDamaged, error_of
from beringia.records.record import Record


class ErrorDocument(Record):
    """One error."""

    code: str
    """Of its class in `beringia.errors`; `bug` for an error that is none of ours."""
    message: str
    path: str | None = None
    """The file it is about, where the class has one."""

    @classmethod
    def of(cls, error: Exception) -> ErrorDocument:
        """As it is sent."""
        if not isinstance(error, BeringiaError):
            return cls(code=BUG, message=f"{type(error).__name__}: {error}")
        return cls(code=error.code, message=str(error), path=getattr(error, "path", None))

    def error(self) -> BeringiaError:
        """As it is raised again on the other side. A code that we do not know is an error of the root's class."""
        kind = error_of(self.code)
        if issubclass(kind, CheckpointDamaged):
            return kind(self.message, self.path or "")
        return kind(self.message)


BUG = "bug"
