"""Where images come from: every kind of source behind one contract."""

from typing import TYPE_CHECKING

from repa.base.lazy import exports

if TYPE_CHECKING:
    from repa.data.sources.contract import Source as Source
    from repa.data.sources.opening import open_source as open_source
else:
    __getattr__, __dir__, __all__ = exports(__name__)
