import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peerlm.cli import main
from peerlm.errors import PeerlmWarning, UserError
from peerlm.evaluate import evaluate
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.testing import float64

from ..processes import run
from .tasks import command_with_few_tasks, few_of_lm_evals_tasks, write_task

harness = pytest.importorskip("peerlm.evaluate.harness")

# lm-eval and what it imports warn of their own affairs
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow, pytest.mark.usefixtures("float64")]

QUESTIONS = [
    {"query": "The old keeper climbed", "choices": ["the stairs.", "went home so that", "a café"], "gold": 0},
    {"query": "Nobody answered", "choices": ["apples", "the door, so"], "gold": 1},
]
PASSAGES = [
    {"context": "The old keeper climbed the stairs and lit the", "continuation": "lamp"},
    {"context": "Nobody answered the", "continuation": "door"},
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder with a task file of each kind, and their data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "choice", QUESTIONS, "multiple_choice", "{{query}}", "{{gold}}", "acc", "{{choices}}")
    write_task(folder, "words", PASSAGES, "loglikelihood", "{{context}}", "{{' ' + continuation}}", "perplexity")
    text = [{"text": "The old keeper climbed the stairs and lit the lamp. " * 6}]
    write_task(folder, "rolling", text, "loglikelihood_rolling", "", "{{text}}", "bits_per_byte")
    return folder


@pytest.fixture(scope="module")
def model(tokenizer):
    """Milder than the other tests' model: lm-eval cannot print a perplexity of e^100."""
    torch.manual_seed(0)
    peer = {"num_experts": 64, "heads": 2, "experts_per_head": 4, "key_dim": 8}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = PeerForCausalLM(PeerConfig(vocab_size=len(tokenizer), ffw_layers=["dense", "peer"], peer=peer, **sizes))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    return model.double().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _nats(model, tokenizer, context: str, continuation: str) -> float:
    """Of the continuation, from the loss that transformers itself computes."""
    before, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (context, context + continuation))
    assert whole[: len(before)] == before
    ids = torch.tensor([whole])
    labels = ids.clone()
    labels[:, : len(before)] = -100
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item() * (len(whole) - len(before))


def test_loglikelihoods_are_those_of_the_plain_model(model, tokenizer, saved, tasks) -> None:
    row = harness.evaluate_tasks(saved, [tasks / "words.yaml"])["words"]
    nats = [_nats(model, tokenizer, each["context"], " " + each["continuation"]) for each in PASSAGES]
    assert row["documents"] == 2
    assert math.log(row["perplexity"]) == pytest.approx(sum(nats) / 2)


def test_choices_are_the_likeliest_of_the_plain_model(model, tokenizer, saved, tasks) -> None:
    row = harness.evaluate_tasks(saved, [tasks / "choice.yaml"])["choice"]
    right = 0
    for each in QUESTIONS:
        nats = [_nats(model, tokenizer, each["query"], " " + choice) for choice in each["choices"]]
        right += nats.index(min(nats)) == each["gold"]
    assert row["acc"] == right / 2


def test_rolling_perplexity_is_that_of_the_plain_model(model, tokenizer, saved, tasks) -> None:
    text = "The old keeper climbed the stairs and lit the lamp. " * 6
    ids = tokenizer(text, add_special_tokens=False).input_ids
    context = model.config.max_position_embeddings
    assert len(ids) > context  # several windows
    nats = 0.0
    for start in range(0, len(ids), context):
        targets = ids[start : start + context]
        # Each window reads what stands before its targets; the last one is moved back to be full.
        read = [tokenizer.eos_token_id, *ids][max(0, start + len(targets) - context) : start + len(targets)]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([read])).logits[0, -len(targets) :].log_softmax(-1)
        nats -= logits[torch.arange(len(targets)), torch.tensor(targets)].sum().item()
    row = harness.evaluate_tasks(saved, [tasks / "rolling.yaml"])["rolling"]
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()))


def test_generation_is_that_of_the_plain_model(model, tokenizer, saved) -> None:
    from lm_eval.api.instance import Instance

    prompts = ["The old keeper", "Nobody answered the door, so the keeper"]  # of different lengths: one is padded
    requests = [
        Instance("generate_until", {}, (prompt, {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}), index)
        for index, prompt in enumerate(prompts)
    ]
    written = harness.PeerHarness(saved, batch_size=2).generate_until(requests, disable_tqdm=True)
    for prompt, text in zip(prompts, written, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        assert text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True).split("\n\n")[0]


def test_questions_in_a_chat_are_what_the_template_writes(model, tokenizer, saved, tasks, tmp_path) -> None:
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|endoftext|>{% endfor %}[assistant]:"
    )
    folder = tmp_path / "chatting"
    shutil.copytree(saved, folder)
    chatting.save_pretrained(folder)
    rows = harness.evaluate_tasks(folder, [tasks], chat=True)
    right = 0
    for each in QUESTIONS:
        asked = f"[user] {each['query']}<|endoftext|>[assistant]:"
        nats = [_nats(model, tokenizer, asked, choice) for choice in each["choices"]]
        right += nats.index(min(nats)) == each["gold"]
    assert rows["choice"]["acc"] == right / 2
    nats = [
        _nats(model, tokenizer, f"[user] {each['context']}<|endoftext|>[assistant]:", " " + each["continuation"])
        for each in PASSAGES
    ]
    assert math.log(rows["words"]["perplexity"]) == pytest.approx(sum(nats) / 2)
    assert rows["words"]["start_from"] == "the chat template"
    assert not any("lost" in row for row in rows.values())  # marks of turns are no text that the tokenizer drops
    plain = harness.evaluate_tasks(saved, [tasks / "rolling.yaml"])["rolling"]
    assert rows["rolling"]["bits_per_byte"] == plain["bits_per_byte"]  # no question


def test_a_chat_needs_a_template_and_tasks(saved, tasks, capsys) -> None:
    main_exits(["eval", str(saved), "--tasks", str(tasks), "--chat"], 2)
    assert "no chat template: leave out --chat" in capsys.readouterr().err
    main_exits(["eval", str(saved), "--chat"], 2)
    assert "--chat is for the questions of --tasks" in capsys.readouterr().err


def test_a_folder_of_tasks_and_a_limit(saved, tasks, capsys) -> None:
    main_exits(["eval", str(saved), "--tasks", str(tasks), "--limit", "1", "--json", "-"])
    rows = json.loads(capsys.readouterr().out)
    assert set(rows) == {"choice", "words", "rolling"}
    assert all(row["documents"] == 1 for row in rows.values())


def test_files_and_tasks_in_one_table(saved, tasks, tmp_path, capsys) -> None:
    book = tmp_path / "book.txt"
    book.write_text("The old keeper climbed the stairs and lit the lamp.\n")
    main_exits(["eval", str(saved), str(book), "--tasks", str(tasks / "words.yaml")])
    out = capsys.readouterr().out
    assert "words" in out
    assert "bits per byte" in out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("{{context}}", "{{context"), "TemplateSyntaxError: unexpected end of template"),
        (("{{context}}", "{{contxt}}"), "UndefinedError: 'contxt' is undefined"),
        (("words.jsonl", "none.jsonl"), "StopIteration"),
    ],
)
def test_what_a_task_file_gets_wrong_is_one_sentence(saved, tasks, change, reason) -> None:
    (tasks / "none.jsonl").write_text("")
    file = tasks / "words.yaml"
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(UserError, match=rf"lm-eval cannot run words \({reason}.*\); fix the task file"):
        harness.evaluate_tasks(saved, [file])


def test_a_figure_too_large_for_lm_eval_is_named(saved, tasks) -> None:
    (tasks / "rolling.jsonl").write_text(json.dumps({"text": "lamp" * 2000}) + "\n")
    file = tasks / "rolling.yaml"
    file.write_text(file.read_text().replace("bits_per_byte", "word_perplexity"))
    with pytest.raises(UserError, match="a perplexity of rolling is too large to write; ask for bits_per_byte"):
        harness.evaluate_tasks(saved, [file])


def test_a_name_that_two_files_define(saved, tasks) -> None:
    (tasks / "again.yaml").write_text((tasks / "words.yaml").read_text())
    with pytest.raises(UserError, match=r"defines no task of its own; it needs a line `task: NAME`, with a name that"):
        harness.evaluate_tasks(saved, [tasks])


@pytest.mark.parametrize("option", ["--detokenize", "--stride=3"])
def test_options_of_files_are_not_for_tasks(saved, tasks, option, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(saved), "--tasks", str(tasks / "words.yaml"), option])
    assert stopped.value.code == 2
    assert "error: --stride, --detokenize and --copying are for files, and there are none" in capsys.readouterr().err


def main_exits(arguments, code: int = 0) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code


def test_lm_evals_own_command(saved, tasks, tmp_path) -> None:
    """The file that it writes has the figures of `peerlm eval`."""
    ours = harness.evaluate_tasks(saved, [tasks / "words.yaml"])["words"]["perplexity"]
    command = ["run", "--model", "peerlm", "--model_args", f"pretrained={saved}", "--tasks", str(tasks / "words.yaml")]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command += ["--output_path", str(tmp_path / "out")]
    place = few_of_lm_evals_tasks(tmp_path / "few")
    code, said = run(tmp_path / "said", environment, command_with_few_tasks, place, command)
    assert code == 0, said
    (file,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(file.read_text())["results"]["words"]["perplexity,none"] == pytest.approx(ours)


def test_lm_evals_generic_model_gives_the_same(saved, tasks) -> None:
    ours = harness.evaluate_tasks(saved, [tasks / "words.yaml"])["words"]["perplexity"]
    manager, names = harness._find_tasks([tasks / "words.yaml"])
    arguments = {"pretrained": str(saved), "device": "cpu", "dtype": "float64"}
    theirs = harness.simple_evaluate(model="hf", model_args=arguments, tasks=names, task_manager=manager)
    assert theirs["results"]["words"]["perplexity,none"] == pytest.approx(ours)


@pytest.mark.parametrize(
    ("tasks_given", "options", "message"),
    [
        (["nowhere.yaml"], {}, "nowhere.yaml is not a file"),
        (["empty"], {}, "empty has no task files"),
        (["empty/broken.yaml"], {}, "broken.yaml defines no task of its own|cannot be read"),
        (["no_such_task"], {}, "lm-eval knows no task 'no_such_task'"),
        (["tasks/words.yaml"], {"limit": 0}, "limit is 0; it must be at least 1"),
        (["tasks/words.yaml"], {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        (["tasks/words.yaml"], {"context": 65}, "reads at most 64 tokens"),
        (["tasks/words.yaml"], {"device_rows": 9}, "device_rows is 9, but the model runs on"),
        (["tasks/bad.yaml"], {}, "lm-eval cannot run bad"),
    ],
)
def test_errors(saved, tasks, tmp_path, monkeypatch, tasks_given, options, message) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", few_of_lm_evals_tasks(tmp_path / "few"))
    assert harness._find_tasks(["swag"])[1] == ["swag"]
    monkeypatch.setattr("peerlm.evaluate.loading.CACHING", [])
    Path("empty").mkdir()
    if "empty/broken.yaml" in tasks_given:
        Path("empty/broken.yaml").write_text("dataset_path: json\n")
    write_task(tasks, "bad", [{"context": "a", "continuation": "b"}], "loglikelihood", "{{context}}", "x", "no_metric")
    with pytest.raises(UserError, match=message):
        harness.evaluate_tasks(saved, tasks_given, **options)


@pytest.fixture(scope="module")
def llama(make_tokenizer, tmp_path_factory) -> Path:
    """A saved model whose documents begin with <s> and, by its tokenizer, end with </s>."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(template="<s> $A </s>", bos="<s>")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), **sizes, max_position_embeddings=64, initializer_range=0.5, pad_token_id=2
    )
    folder = tmp_path_factory.mktemp("llama") / "model"
    with float64():
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("start", ["auto", "none", "</s>"])
def test_tasks_and_files_give_the_same_bits_per_byte(llama, tmp_path, start) -> None:
    text = "river lantern moss quiet copper ladder winter orchard signal paper harbour tin violet"
    pages = [(text[9 * number :] + " ") * (1 + number % 3) for number in range(6)]
    write_task(
        tmp_path, "pages", [{"page": page} for page in pages], "loglikelihood_rolling", "", "{{page}}", "bits_per_byte"
    )
    tasks = harness.evaluate_tasks(llama, [tmp_path / "pages.yaml"], context=16, document_start=start)["pages"]
    row: dict[str, float] = {"nats": 0.0, "bytes": 0}
    for number, page in enumerate(pages):
        file = tmp_path / f"{number}.txt"
        file.write_text(page)
        stride = 15 if start == "auto" else 16  # what lm-eval's windows advance by
        (figures,) = evaluate(llama, [file], context=16, stride=stride, document_start=start, progress=False).values()
        row["nats"] += figures["bits_per_byte"] * figures["bytes"]
        row["bytes"] += len(page)
    assert tasks["bits_per_byte"] == pytest.approx(row["nats"] / row["bytes"])
    assert tasks["document_start"] == {"auto": "<s>", "none": None, "</s>": "</s>"}[start]


def test_tasks_begin_texts_once_and_never_end_them(llama) -> None:
    model = harness.PeerHarness(llama)
    ids = model.tokenizer("tin", add_special_tokens=False).input_ids
    assert model.tok_encode("tin") == [0, *ids]
    assert model.tok_encode("<s>tin") == [0, *ids]
    assert model.tok_batch_encode(["tin"])[0].tolist() == [[0, *ids]]
    assert model.prefix_token_id == 0
    assert harness.PeerHarness(llama, document_start="none").tok_encode("tin") == ids


def test_choices_are_scored_after_the_beginning(llama, tmp_path) -> None:
    from lm_eval.api.instance import Instance

    model = harness.PeerHarness(llama)
    (found,) = model.loglikelihood([Instance("loglikelihood", {}, ("river", " moss"), 0)], disable_tqdm=True)
    before, whole = (model.tokenizer(text, add_special_tokens=False).input_ids for text in ("river", "river moss"))
    ids = torch.tensor([[0, *whole]])
    with torch.no_grad():
        logits = model.model(ids).logits[0].log_softmax(-1)
    expected = sum(logits[place, ids[0, place + 1]].item() for place in range(len(before), len(whole)))
    assert found[0] == pytest.approx(expected)


def test_generation_in_tasks_is_by_the_tasks_own_word(llama, monkeypatch) -> None:
    model = harness.PeerHarness(llama)
    assert model.model.generation_config.top_k is None
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(harness.HFLM, "_model_generate", lambda self, **options: seen.append(options))
    model._model_generate(context=None, max_length=1, stop=[], do_sample=True, temperature=1.0)
    model._model_generate(context=None, max_length=1, stop=[], do_sample=True, top_k=5)
    model._model_generate(context=None, max_length=1, stop=[], do_sample=False)
    assert [options.get("top_k") for options in seen] == [0, 5, None]


def test_text_that_tasks_lose_is_said(make_tokenizer, tmp_path) -> None:
    tokenizer = make_tokenizer("spaces")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=64, pad_token_id=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_task(tmp_path, "pages", [{"page": "moss 東京 tin"}], "loglikelihood_rolling", "", "{{page}}", "bits_per_byte")
    with pytest.warns(PeerlmWarning, match="no token for 40% of the texts of pages"):
        row = harness.evaluate_tasks(tmp_path / "model", [tmp_path / "pages.yaml"])["pages"]
    assert row["lost"] == {"dropped": 6 / 15}


def test_data_of_tasks_are_looked_for_where_the_user_says(saved, tasks, tmp_path, capsys, monkeypatch) -> None:
    file = tasks / "words.yaml"
    whole = harness.evaluate_tasks(saved, [file])
    file.write_text(file.read_text().replace(json.dumps(str(tasks / "words.jsonl")), "words.jsonl"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    message = r"words\.yaml reads words\.jsonl, which is not in .*elsewhere: name the folder that has it"
    with pytest.raises(UserError, match=message):
        harness.evaluate_tasks(saved, [file])
    with pytest.raises(UserError, match=r"--task-data none is not a folder"):
        harness.evaluate_tasks(saved, [file], task_data="none")
    assert harness.evaluate_tasks(saved, [file], task_data=tasks) == whole
    assert Path.cwd() == tmp_path / "elsewhere"
    main_exits(["eval", str(saved), "--tasks", str(file), "--task-data", str(tasks), "--json", "-"])
    assert json.loads(capsys.readouterr().out) == whole
    with pytest.raises(UserError, match=r"copa\.yaml reads copa\.jsonl, which is not in .*elsewhere"):
        harness.evaluate_tasks(saved, [Path(__file__).parents[2] / "recipes/tasks/copa.yaml"])
