"""The model card of a converted model: what it is, and how to open it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel
from yaml import YAMLError  # type: ignore[import-untyped]

from peerlm.convert.record import ConversionConfig

_CARD = """---
{metadata}
---

# {name}

`{source}` ({architecture}) with PEER layers {place} {count} of its feed-forward layers, converted with peerlm:

{layers}

Initialisation: {init}. Settings: {settings}. {training}
{cost}
## Use

Import peerlm before you load the model. transformers alone does not know its experts, and refuses it; with
`trust_remote_code=True` it imports peerlm itself.

```python
import peerlm
from {package} import {architecture}

model = {architecture}.from_pretrained("{name}")
```
"""
_TRAINING = {
    "random": "PEER has to be trained before it adds to the model.",
    "neurons": "Experts are the layers' own neurons, of which each token retrieves a share.",
}
_PLACES = {"beside": "beside", "replace": "in place of"}


def conversion_card(
    model: PreTrainedModel, record: ConversionConfig, *, name: str, source: Path, measured: Mapping[str, Any]
) -> ModelCard:
    """The card, in the form of model hubs: metadata as YAML, then text.

    Args:
        model: the converted model.
        record: what was done to it.
        name: what it is called.
        source: the folder of the model that it was made from; licence and languages are those of its card.
        measured: "perplexity_before" and "perplexity_after", "layer_errors" by path, as far as they were measured.
    """
    sites = record.read_sites()
    data = ModelCardData(
        library_name="transformers", tags=["peerlm", "peer"], model_name=name, **_terms_of(source / "README.md")
    )
    return ModelCard(
        _CARD.format(
            metadata=data.to_yaml(),
            name=name,
            source=source.name,
            architecture=type(model).__name__,
            package=type(model).__module__.partition(".")[0],
            place=_PLACES[record.mode],
            count=len(sites),
            layers="\n".join(f"- `{site.path}`" for site in sites),
            init=record.init,
            training=_TRAINING[record.init],
            cost=_cost(measured),
            settings=", ".join(f"{key} = {value}" for key, value in record.settings.items()) or "PEER's own",
        )
    )


def _cost(measured: Mapping[str, Any]) -> str:
    lines = []
    if "perplexity_after" in measured:
        before, after = measured["perplexity_before"], measured["perplexity_after"]
        lines.append(f"\nPerplexity on text that was held out: {before:.2f} before, {after:.2f} after.\n")
    if errors := measured.get("layer_errors"):
        lines.append("\nError of each layer's output, relative to the dense layer's, on the text it learned from:\n\n")
        lines.append("| layer | error |\n|---|---|\n")
        lines += [f"| `{path}` | {error:.3f} |\n" for path, error in errors.items()]
    return "\n## What it costs\n" + "".join(lines) if lines else ""


def _terms_of(card: Path) -> dict[str, Any]:
    """Licence and languages that a card states; none where there is no card that can be read."""
    try:
        stated = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):
        return {}
    return {name: stated[name] for name in ("license", "license_name", "license_link", "language") if name in stated}
