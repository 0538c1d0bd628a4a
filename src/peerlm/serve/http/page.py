"""The page at /: its files, as they are."""

from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

from peerlm.serve.http.problems import Problem, documented

FILES = {
    "page.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "main.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""The page's files and their types."""
router = APIRouter(include_in_schema=False)


def _file(name: str) -> Response:
    content = (resources.files("peerlm.serve.http") / "page" / name).read_bytes()
    return Response(content, media_type=FILES[name], headers={"cache-control": "no-cache"})


@router.get("/")
def index() -> Response:
    """The page itself."""
    return _file("page.html")


@router.get("/page/{name}", responses=documented(404))
def part(name: str) -> Response:
    """Its style, its program and its icon."""
    if name not in FILES:
        raise Problem(404, f"the page has no {name}", code="no_such_path")
    return _file(name)
