"""What one layer leaves for another within a forward."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

Content = TypeVar("Content")


class Handover(Generic[Content]):
    """Something that is taken once; copies of a model begin with an empty one."""

    def __init__(self) -> None:
        self.content: Content | None = None

    def take(self) -> Content | None:
        """Return what was left, once."""
        content, self.content = self.content, None
        return content

    def __getstate__(self) -> dict[str, Any]:
        """Leave the content out of copies and pickles."""
        return {"content": None}
