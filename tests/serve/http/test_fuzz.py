"""Requests made up from our own OpenAPI document: none makes the server fail."""

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from peerlm.marks import document_marks
from peerlm.serve.http.app import create_app
from peerlm.serve.http.settings import HttpSettings
from peerlm.serve.http.texts import Texts

from .toy import ToyEngine

EXAMPLES = 5
"""For each route."""


def test_no_request_makes_the_server_fail(tokenizer, packs_folder):
    engine = ToyEngine(tokenizer)
    http = HttpSettings(name="toy", packs_folder=packs_folder, admin_token="admin")
    app = create_app(engine, Texts(tokenizer, document_marks(tokenizer)), http)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    tried = set()

    def ask(case):
        tried.add(case.path)
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "toy"  # or all but a few requests end at an unknown model
        checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
        case.call_and_validate(checks=checks, headers={"authorization": "Bearer admin"})

    few = settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for operation in schema.get_all_operations():
        few(given(case=operation.ok().as_strategy())(ask))()
    engine.close()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/tokenize"} <= tried
