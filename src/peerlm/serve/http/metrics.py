"""/metrics and /health: for Prometheus and for load balancers."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from peerlm.serve.http.problems import documented
from peerlm.serve.http.served import Served

router = APIRouter(tags=["Operation"])


@router.get("/metrics", response_class=Response, responses=documented(401))
def metrics(served: Served) -> Response:
    """Figures for Prometheus."""
    return Response(served.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/health", responses={503: {"description": "The server stops."}})
def health(served: Served) -> JSONResponse:
    """Whether the server takes requests: 200, or 503 while it stops."""
    if served.draining:
        return JSONResponse({"status": "draining"}, status_code=503)
    return JSONResponse({"status": "ok"})
