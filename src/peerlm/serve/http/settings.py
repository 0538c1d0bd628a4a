"""What whoever starts the server decides."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """The names, limits and secrets of a server."""

    name: str
    """What the model is called."""
    api_keys: tuple[str, ...] = ()
    """Keys of clients; without any, whoever reaches the server may use it."""
    admin_token: str | None = None
    """Of who may load and unload packs; None: no one."""
    packs_folder: Path | None = None
    """Folder that packs and adapters are loaded from over HTTP; None: none are."""
    max_body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    """How long the head of a request may take to arrive, and then its body."""
    max_new_tokens: int | None = None
    """Most tokens that a request may ask for; None: as many as the context has room for."""
    max_sequences: int = 128
    """Most texts that a request may ask for: prompts times n."""
    deadline_seconds: float = 600.0
    """How long a request may take, its time in the queue included."""
    allow_origins: tuple[str, ...] = ()
    """Web sites, such as https://example.org, whose pages may use this server from a browser."""
    hosts: tuple[str, ...] | None = None
    """Names that this server has in addresses, besides those that mean this machine to itself; None: any."""
    log_prompts: bool = False
    """Whether the log has prompts and texts."""
