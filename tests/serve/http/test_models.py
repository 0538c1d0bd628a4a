"""/v1/models, and packs loaded and unloaded over HTTP."""

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

ADMIN = {"authorization": "Bearer admin"}


@pytest.fixture
def packs(start):
    return start()


def load(running, name, path):
    return running.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path}, headers=ADMIN)


def unload(running, name):
    return running.http.post("/v1/unload_lora_adapter", json={"lora_name": name}, headers=ADMIN)


def test_a_loaded_pack_is_a_model_and_an_unloaded_one_is_not(packs):
    assert [model.id for model in packs.openai.models.list()] == ["toy"]
    assert load(packs, "a", "one").text == "Success: pack 'a' added: the model toy:a."
    assert load(packs, "b", "two").status_code == 200
    found = list(packs.openai.models.list())
    assert [model.id for model in found] == ["toy", "toy:a", "toy:b"]
    assert (found[0].max_model_len, found[0].chat, found[0].parent, found[1].parent) == (64, True, None, "toy")
    for name, expected in (("toy", ()), ("toy:a", ("a",)), ("a", ("a",)), ("toy:b+a", ("b", "a"))):
        assert packs.openai.models.retrieve(name).owned_by == "peerlm"
        answer = packs.openai.completions.create(model=name, prompt="lamp", max_tokens=1)
        assert answer.model == name
        assert packs.engine.requests[-1].packs == expected
    assert unload(packs, "a").text == "Success: 'a' removed."
    with pytest.raises(openai.NotFoundError, match="packs: b"):
        packs.openai.completions.create(model="toy:a", prompt="lamp")
    with pytest.raises(openai.NotFoundError):
        packs.openai.models.retrieve("toy:a")
    assert packs.post("/v1/completions", prompt="x", model="toy:b+b").status_code == 400


def test_what_cannot_be_loaded_is_said(packs):
    assert load(packs, "a", "one").status_code == 200
    for name, path, says in (
        ("a", "two", "taken or unusual"),
        ("toy", "two", "name of the base model"),
        ("x/y", "two", "taken or unusual"),
        ("c", "none", "no folder below"),
    ):
        answer = load(packs, name, path)
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]
    assert unload(packs, "none").status_code == 404


def test_a_pack_in_use_is_not_unloaded(start):
    slow = start(engine_pace=0.01)
    load(slow, "a", "one")
    with slow.openai.completions.create(model="toy:a", prompt="lamp", max_tokens=60, stream=True) as stream:
        next(iter(stream))
        answer = unload(slow, "a")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "in_use")
    assert slow.engine.drain(5)
    assert unload(slow, "a").status_code == 200


@pytest.mark.parametrize(
    "path", ["..", "../packs", "one/../../x", "/etc", "link", "with_link", ".", "", "one\0", "one\\..\\..", "a.txt"]
)
def test_no_name_leaves_the_folder(start, tmp_path, path):
    root = tmp_path / "packs"
    (root / "with_link").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for folder in (root / "with_link", tmp_path / "outside"):
        (folder / "manifest.json").write_text("{}")
    (root / "a.txt").write_text("")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "with_link" / "weights").symlink_to(tmp_path / "outside" / "manifest.json")
    running = start(packs_folder=root)
    answer = load(running, "a", path)
    assert answer.status_code == 400
    assert running.engine.loaded() == {}


def test_a_pack_that_is_unloaded_while_its_request_is_read_is_404(packs, monkeypatch):
    load(packs, "a", "one")
    submit = packs.engine.submit

    def too_late(request):
        packs.engine.unload("a")
        return submit(request)

    monkeypatch.setattr(packs.engine, "submit", too_late)
    answer = packs.post("/v1/completions", model="toy:a", prompt="lamp")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_without_a_folder_nothing_is_loaded_over_http(start):
    answer = load(start(packs_folder=None), "a", "one")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "no_pack_folder")


def test_the_figures_are_those_that_prometheus_reads(packs):
    load(packs, "a", "one")
    packs.post("/v1/completions", prompt="lamp")
    packs.http.get("/none")
    values = {}
    while ("peerlm_http_requests_total", "404", "other") not in values:  # counted once the answer has been sent
        families = text_string_to_metric_families(packs.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        values = {(sample.name, *sorted(sample.labels.values())): sample.value for sample in samples}
    assert values["peerlm_generated_tokens_total",] == 4
    assert values["peerlm_finished_total", "length"] == 1
    assert values["peerlm_first_token_seconds_bucket", "1.0"] == 3
    assert values["peerlm_first_token_seconds_count",] == 3
    assert values["peerlm_layer_share", "model.layers.1.ffw"] == 0.5
    assert values["peerlm_layer_unevenness", "model.layers.1.ffw"] == 0.25
    assert values["peerlm_pack_requests", "a", "pack"] == 0
    assert values["peerlm_http_requests_total", "/v1/completions", "200"] == 1
    assert values["peerlm_http_requests_total", "404", "other"] == 1


def test_texts_become_tokens_and_texts_again(toy):
    found = toy.http.post("/tokenize", json={"prompt": "a café 灯", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    text = toy.http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"]
    assert text.endswith("a café 灯")
    chat = toy.http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"]
    assert toy.engine.tokenizer.decode(chat) == "user: hi\nassistant: "
    assert toy.http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
    assert toy.http.post("/tokenize", json={}).status_code == 400
    assert toy.http.get("/tokenizer_info").json()["eos_token"] == toy.engine.tokenizer.eos_token


def test_tokens_that_are_no_text_alone_are_written_as_bytes(toy):
    ids = toy.http.post("/tokenize", json={"prompt": "Ω"}).json()
    texts = toy.app.state.served.texts
    parts = [texts.token(token) for token in ids["tokens"][-2:]]
    assert b"".join(content for _, content in parts) == "Ω".encode()
    assert [text for text, _ in parts] == ["bytes:\\xce", "bytes:\\xa9"]
