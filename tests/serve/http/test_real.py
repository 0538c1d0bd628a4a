"""The whole way: a saved model, the real engine, HTTP, and clients that others wrote."""

import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import openai
import pytest
import torch

from peerlm.cli import main
from peerlm.marks import document_marks
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.packs import load_pack, new_pack, pack_parameters, save_pack, unload_pack
from peerlm.serve import Engine
from peerlm.serve.http.run import greeting
from peerlm.serve.http.settings import HttpSettings

from ...evaluate.tasks import write_task
from ...models import run
from ...processes import start
from .conftest import Running

QUESTIONS = [
    {"query": "The old keeper climbed", "choices": ["the stairs.", "went home so that", "a café"], "gold": 0},
    {"query": "Nobody answered", "choices": ["apples", "the door, so"], "gold": 1},
]
PASSAGES = [
    {"context": "The old keeper climbed the stairs and lit the", "continuation": "lamp"},
    {"context": "A café", "continuation": "that was all."},
]


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(1)
    peer = {"num_experts": 64, "heads": 2, "experts_per_head": 4, "key_dim": 8}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = PeerForCausalLM(
        PeerConfig(
            vocab_size=len(tokenizer), ffw_layers=["dense", "peer"], peer=peer, tie_word_embeddings=False, **sizes
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(8)
        model.model.norm.weight.uniform_(0.5, 2)
        model.lm_head.weight.normal_(std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    """The saved model, and a pack that changes what it writes."""
    folder = tmp_path_factory.mktemp("real")
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    new_pack(model, "law", 16)
    with torch.no_grad():
        for parameter in pack_parameters(model, "law"):
            parameter.normal_(std=2.0)
    save_pack(model, "law", folder / "law")
    unload_pack(model, "law")
    return folder


@pytest.fixture(scope="module")
def served(model, tokenizer, folder):
    settings = HttpSettings(name="real", packs_folder=folder, admin_token="admin")
    running = Running(Engine(model, tokenizer, slots=4), settings, tokenizer)
    yield running
    running.stop()


def greedy(model, tokenizer, prompt, tokens):
    ids = torch.tensor([[*document_marks(tokenizer).prompt_start, *tokenizer(prompt).input_ids]])
    written = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_texts_are_those_of_generate_and_packs_change_them_for_who_asks(model, tokenizer, folder, served):
    plain = greedy(model, tokenizer, "The old keeper", 12)
    load_pack(model, folder / "law")
    changed = greedy(model, tokenizer, "The old keeper", 12)
    unload_pack(model, "law")
    assert plain != changed
    client, asked = served.openai, {"prompt": "The old keeper", "max_tokens": 12, "temperature": 0}
    stream = client.completions.create(model="real", stream=True, **asked)
    first = next(iter(stream)).choices[0].text
    body = {"lora_name": "law", "lora_path": "law"}
    headers = {"authorization": "Bearer admin"}
    assert served.http.post("/v1/load_lora_adapter", json=body, headers=headers).status_code == 200
    assert client.completions.create(model="real:law", **asked).choices[0].text == changed
    assert first + "".join(chunk.choices[0].text for chunk in stream) == plain
    assert client.completions.create(model="real", **asked).choices[0].text == plain
    assert served.http.post("/v1/unload_lora_adapter", json=body | {}, headers=headers).status_code == 400
    del body["lora_path"]
    assert served.http.post("/v1/unload_lora_adapter", json=body, headers=headers).status_code == 200
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="real:law", **asked)


def test_experts_are_those_of_the_layer(served):
    answer = served.http.post(
        "/v1/completions", json={"model": "real", "prompt": "lamp", "max_tokens": 2, "experts": True}
    ).json()
    (layer,) = answer["choices"][0]["experts"][0]
    assert layer["layer"].startswith("model.layers.1.ffw")
    assert len(layer["ids"]) == len(layer["weights"]) <= 8


def test_the_client_of_the_document_works(served, capsys):
    document = (Path(__file__).parents[3] / "docs/serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", document, flags=re.MULTILINE | re.DOTALL)
    assert 'model="a"' in block
    block = block.replace("http://127.0.0.1:8000", served.url).replace('model="a"', 'model="real"')
    exec(compile(block, "docs/serving.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval and what it imports warn of their own affairs
def test_lm_eval_over_http_finds_what_our_own_evaluation_finds(served, folder, tokenizer, tmp_path, monkeypatch):
    harness = pytest.importorskip("peerlm.evaluate.harness")
    for package in ("aiohttp", "tenacity"):  # of the extra lm_eval[api]
        pytest.importorskip(package)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_task(tmp_path, "choice", QUESTIONS, "multiple_choice", "{{query}}", "{{gold}}", "acc", "{{choices}}")
    write_task(tmp_path, "words", PASSAGES, "loglikelihood", "{{context}}", "{{' ' + continuation}}", "perplexity")
    manager = harness.TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = harness.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "real",
            "base_url": f"{served.url}/v1/completions",
            "tokenizer_backend": "remote",
            "max_length": 64,
            "num_concurrent": 2,
        },
        tasks=["choice", "words"],
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
    )["results"]
    ours = harness.evaluate_tasks(folder / "model", [tmp_path / "choice.yaml", tmp_path / "words.yaml"])
    assert found["words"]["perplexity,none"] == pytest.approx(ours["words"]["perplexity"], rel=1e-4)
    assert found["choice"]["acc,none"] == ours["choice"]["acc"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--api-key", ""], "a key or token is empty"),
        (["--admin-token", ""], "a key or token is empty"),
        (["--pack", "law"], "--pack is 'law': write NAME=FOLDER"),
        (["--pack", "law=nowhere"], "--pack law=nowhere: "),
        (["--pack-folder", "nowhere", "--admin-token", "t"], "--pack-folder nowhere is not a folder"),
        (["--pack-folder", "."], "--pack-folder needs --admin-token"),
        (["--context", "100000"], "the model was made for 64 tokens"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1:0"),
        (["--document-start", "<none>"], "--document-start is '<none>'"),
    ],
    ids=str,
)
def test_the_command_says_what_is_wrong(folder, capsys, options, says):
    assert run("serve", folder / "model", "--port", 0, *options) == 2
    assert says in capsys.readouterr().err


def test_a_port_in_use_is_said_before_the_model_is_loaded(served, capsys):
    assert run("serve", "nowhere", "--port", served.listener.getsockname()[1]) == 2
    assert "give another --host or --port" in capsys.readouterr().err


def test_the_greeting_has_a_command_that_can_be_typed():
    locked = HttpSettings(name="it's", api_keys=("secret",))
    lines = greeting("http://192.0.2.1:8000", locked, ("law",))
    words = shlex.split(lines[1])
    assert json.loads(words[-1])["model"] == "it's"
    assert "Authorization: Bearer $KEY" in words
    assert not any("secret" in line for line in lines)
    open_to_all = greeting("http://192.0.2.1:8000", HttpSettings(name="a"), ())
    assert "Whoever reaches this address may use the model" in open_to_all[-1]
    assert len(greeting("http://127.0.0.1:8000", HttpSettings(name="a"), ())) == 2


def test_the_command_serves_and_drains_at_sigterm(folder, tmp_path):
    words = ["serve", str(folder / "model"), "--port", "0", "--name", "real", "--pack", f"law={folder / 'law'}"]
    output = tmp_path / "output.txt"
    process = start(output, {}, main, words)
    try:
        while "Packs are models too: real:law" not in (output.read_text() if output.exists() else ""):
            assert process.is_alive(), output.read_text()
            time.sleep(0.02)
        url = re.search(r"Serving real at (\S+)", output.read_text())[1]
        assert f"curl {url}/v1/completions" in output.read_text()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="real:law", prompt="lamp", max_tokens=60, stream=True)
        chunks = [next(iter(stream))]
        os.kill(process.pid, signal.SIGTERM)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        process.join(60)
        assert process.exitcode == 0, output.read_text()
        assert '"path": "/v1/completions", "status": 200' in output.read_text()
    finally:
        process.kill()
        process.join()
