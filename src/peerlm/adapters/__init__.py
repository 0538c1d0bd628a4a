"""Adapters: pools of low-rank experts that tokens retrieve, as a method of peft, and a library of whole adapters.

The method needs peft, and is loaded when it is first used; the library does not.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peerlm.adapters.config import PeerAdapterConfig, PeerAdapterModel

__all__ = ["PeerAdapterConfig", "PeerAdapterModel"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from peerlm.adapters import config

    return getattr(config, name)
