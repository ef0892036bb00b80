"""Where images come from: every kind of source behind one contract."""

from repa.base.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, {"Source": "contract", "open_source": "opening"})
