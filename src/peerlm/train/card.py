"""The model card of a finished run: what the model is, what it was trained on and how far, and how good it is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from peerlm.data import Manifest
from peerlm.data.request import source_name
from peerlm.errors import listed
from peerlm.model.configuration_peer import parts_of
from peerlm.train.config import TrainConfig

_CARD = """---
{metadata}
---

# {name}

A language model of {blocks} blocks of width {width} with {parameters:,} parameters, {active:,} of them active per
token, trained with peerlm. Feed-forward layers: {layers}.

## Data and budget

{tokens:,} tokens of {sources}, in windows of {context}; {flops:.3g} FLOPs in {steps:,} steps, {seconds:,.0f} s on
{device}. AdamW, peak learning rate {rate:g}, seed {seed}. The recipe is the run's `config.json`.

## Quality

On the held-out split of its data: perplexity {perplexity:.2f}, {loss:.4f} nats per token.
{usage}
## Use

Import peerlm before you load the model. transformers alone does not know the model type `peer`, and refuses it; with
`trust_remote_code=True` it imports peerlm itself.

```python
import peerlm
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""


def model_card(config: TrainConfig, model: PreTrainedModel, summary: Mapping[str, Any]) -> ModelCard:
    """The card, in the form of model hubs: metadata as YAML, then text.

    Args:
        config: what was trained; its licence and language are the user's to add.
        model: the trained model.
        summary: what `summary.json` holds.
    """
    name, data_name = (Path(path).resolve().name for path in (config.run, config.data.folder))
    kinds: Sequence[str] = model.config.ffw_layers
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["peerlm", *dict.fromkeys(part for kind in kinds for part in parts_of(kind))],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=data_name,
                dataset_name=data_name,
                dataset_split="heldout",
                metric_type="perplexity",
                metric_value=round(summary["perplexity"], 4),
            )
        ],
    )
    sources = f"`{config.data.folder}`"
    if config.data.sources:  # what the folder was made from, which need not be what the recipe names
        made_from = Manifest.read(config.data.folder).request["sources"]
        sources = listed(f"`{Path(source_name(source)).name}`" for source in made_from)
    text = _CARD.format(
        metadata=data.to_yaml(),
        name=name,
        blocks=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        parameters=summary["total_parameters"],
        active=summary["active_parameters"],
        layers=", ".join(kinds),
        tokens=summary["tokens"],
        sources=sources,
        context=config.data.context,
        flops=summary["flops"],
        steps=summary["steps"],
        seconds=summary["seconds"],
        device=summary["device"],
        rate=config.optim.learning_rate,
        seed=config.seed,
        perplexity=summary["perplexity"],
        loss=summary["validation_loss"],
        usage=_usage_table(summary["usage"]),
    )
    return ModelCard(text)


def _usage_table(usage: Mapping[str, Mapping[str, float]]) -> str:
    if not usage:
        return ""
    rows = "".join(
        f"| `{name}` | {100 * layer['share']:.1f}% | {layer['unevenness']:.2f} |\n" for name, layer in usage.items()
    )
    return f"\n| layer | experts in use | unevenness, nats |\n|---|---|---|\n{rows}"
