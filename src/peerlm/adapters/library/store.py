"""A library of LoRA adapters on disk: each sequence or token retrieves its own by learned keys, and mixes them."""

import inspect
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from peerlm.adapters.features import features_of
from peerlm.adapters.library.cache import AdapterCache
from peerlm.adapters.library.keys import Keys
from peerlm.adapters.library.lora_files import CONFIG_NAME, WEIGHTS_NAME, LoraWeights, read_lora
from peerlm.adapters.library.manifest import MANIFEST, Manifest, check_name, read_manifest, write_manifest
from peerlm.adapters.library.mix import Mix
from peerlm.errors import UserError, listed
from peerlm.layers.modes import evaluating

ROUTES = ("sequence", "token")
Text = str | Tensor


class _Found(Exception):  # noqa: N818, control flow: the query is known, and the blocks above it need not run
    pass


class AdapterLibrary:
    """Separately trained LoRA adapters of one frozen model, retrieved by keys and mixed by softmax weights.

    The query of a sequence is the mean hidden state of its tokens after block `layer` of the base model, the key of an
    adapter that of texts like those it was trained on; `keys.py` says how they are compared. Adapters lie in
    `folder`, one folder each as peft saves them, and are loaded when they are first retrieved. No weight of the model
    changes: while attached, the library adds each sequence's low-rank terms to the outputs of linear layers.

    Route "sequence" retrieves once for each sequence, by a pass through the first `layer` blocks before the model's
    own; in generation the prompt decides, and later tokens keep its adapters. Route "token" retrieves for each token
    by the mean over the tokens up to it, without a pass of its own; the first `layer` blocks are then not adapted.

    Ranks, alphas and target modules may differ between adapters. Not for training; calls must not overlap in threads.
    Prompts are known by their cache, so that conversations may alternate. Route "token" does not follow beam search,
    which reorders sequences inside the cache. A cache of fixed length, whose mask `generate` makes 4-D, is refused.

    Args:
        model: the base model, with a list of blocks as long as `config.num_hidden_layers`.
        folder: where adapters, keys and the manifest library.json lie; made if it is not there, opened if it is.
        tokenizer: for texts given as strings; token ids need none.
        layer: block whose output queries are, counted from 1; None takes that of the folder, or the middle one.
        top_k: adapters per query.
        route: "sequence" or "token".
        cache_bytes: limit of the adapters kept in memory; those in use now are not counted twice, and always stay.
        window: tokens in the pieces that texts are cut into to learn keys.

    Attributes:
        cache: the adapters in memory, `AdapterCache`.

    Raises:
        UserError: the folder is damaged, or belongs to another model or layer.
        ValueError: a setting is impossible.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        layer: int | None = None,
        top_k: int = 2,
        route: str = "sequence",
        cache_bytes: int = 2**30,
        window: int = 128,
    ):
        if route not in ROUTES:
            raise ValueError(f"route is {route!r}; choose one of {', '.join(ROUTES)}")
        for name, value in (("top_k", top_k), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.model = model
        self.folder = Path(folder)
        self.tokenizer = tokenizer
        self.top_k = top_k
        self.route = route
        self.window = window
        self.cache = AdapterCache(self._load, cache_bytes)
        self._blocks = _blocks(model)
        self._argument_names = list(inspect.signature(model.forward).parameters)
        self._linear = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._mix: Mix | None = None
        self._fixed: dict[str, float] | None = None
        self._sums: tuple[Tensor, Tensor] | None = None
        self._prompts: WeakKeyDictionary[Any, Mix | tuple[Tensor, Tensor]] = WeakKeyDictionary()
        self._mask: Tensor | None = None
        self._busy = False
        manifest = self._open(layer)
        self.layer = manifest.layer
        self._set_keys(manifest.keys)

    def _open(self, layer: int | None) -> Manifest:
        if layer is not None and not 1 <= layer <= len(self._blocks):
            raise ValueError(f"layer is {layer}; the model has blocks 1 to {len(self._blocks)}")
        manifest = read_manifest(self.folder)
        if manifest is None:
            dim = self.model.config.get_text_config().hidden_size
            return Manifest(layer=layer or (len(self._blocks) + 1) // 2, keys=Keys.empty(dim))
        path, dim = self.folder / MANIFEST, self.model.config.get_text_config().hidden_size
        if layer not in (None, manifest.layer):
            raise UserError(f"layer is {layer}, but {path} has keys of layer {manifest.layer}; leave layer out")
        if manifest.layer > len(self._blocks) or len(manifest.keys.scatter) != dim:
            raise UserError(
                f"{path} has keys of {len(manifest.keys.scatter)} features after block {manifest.layer}, but the model "
                f"has {dim} features and {len(self._blocks)} blocks; open it with the model that it was made with"
            )
        for name in manifest.keys.names:
            if not (self.folder / name).is_dir():
                raise UserError(f"{path} names {name!r}, but {self.folder / name} is not there; restore it")
        return manifest

    def _set_keys(self, keys: Keys) -> None:
        self._keys = keys
        self._scorer = keys.scorer().to(self.model.device)
        self._mix = self._sums = None
        self._prompts.clear()

    def _save(self, keys: Keys) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_manifest(self.folder, Manifest(layer=self.layer, keys=keys))
        self._set_keys(keys)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they were added."""
        return self._keys.names

    @property
    def keys(self) -> Tensor:
        """(adapters, hidden size) float32, in the space of hidden states."""
        return self._keys.keys

    def __len__(self) -> int:
        return len(self.names)

    def add(
        self,
        path: str | Path,
        *,
        texts: Sequence[Text] | None = None,
        key: Tensor | None = None,
        name: str | None = None,
    ) -> str:
        """Add the adapter in a folder, and save the library.

        Args:
            path: a folder as peft saves it. One that does not lie directly in the library's folder is copied there.
            texts: texts of the adapter's domain, strings or token ids (length,): their mean is its key, and their
                spread is counted in.
            key: a key made otherwise, (hidden size,). Exactly one of texts and key.
            name: what the adapter is called; the name of its folder if None.

        Returns:
            The name.

        Raises:
            UserError: the adapter cannot be used with this model, or its name is taken.
            ValueError: the key has another size, or there is none.
        """
        source = Path(path)
        inside = source.resolve().parent == self.folder.resolve()
        name = source.name if name is None else name
        check_name(name)
        if inside and name != source.name:
            raise UserError(
                f"{source} lies in the library, so its name is {source.name!r}, not {name!r}; leave name out"
            )
        if name in self.names:
            raise UserError(f"the library has an adapter {name!r} already; give another name, or remove it first")
        if (texts is None) == (key is None):
            raise ValueError("give texts of the adapter's domain, or its key, and not both")
        self._check(read_lora(source), source)
        if texts is not None:
            features = self.features(texts)
            keys = self._keys.with_adapter(name, features.mean(dim=0), features)
        else:
            assert key is not None
            if key.shape != self.keys.shape[1:] or not key.isfinite().all():
                raise ValueError(
                    f"key has shape {tuple(key.shape)}; it must be {tuple(self.keys.shape[1:])} and finite"
                )
            keys = self._keys.with_adapter(name, key.detach().cpu())
        if not inside:
            self._copy(source, name)
        self._save(keys)
        return name

    def _copy(self, source: Path, name: str) -> None:
        target = self.folder / name
        if target.exists():
            raise UserError(f"{target} is there already; add that folder, or give another name")
        partial = self.folder / f".partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(source / file, partial / file)
        partial.replace(target)

    def remove(self, name: str) -> None:
        """Take an adapter out of the library and save it; the adapter's own folder stays."""
        self._check_known([name])
        self.cache.forget(name)
        self._save(self._keys.without(name))

    def fit_keys(self, texts: Mapping[str, Sequence[Text]], *, steps: int = 100, learning_rate: float = 0.05) -> float:
        """Make keys anew from texts whose adapters are known, fit them and the softmax's temperature, and save.

        The last fifth of each adapter's pieces is held out, and decides how long keys are fitted and which temperature
        is right (`Keys.fitted`).

        Args:
            texts: by the adapter's name; the keys of adapters without texts are only pushed away from those of others.
            steps, learning_rate: at the most, and of Adam.

        Returns:
            The share of the held-out pieces whose adapter comes first.

        Raises:
            ValueError: there are no texts, or no adapter has two pieces, so that none could be held out.
        """
        self._check_known(texts)
        if not texts:
            raise ValueError("there are no texts to fit keys to; give some of at least one adapter")
        features = {name: self.features(own) for name, own in texts.items()}
        labels, held_out = [], []
        for name, own in features.items():
            labels.append(torch.full((len(own),), self.names.index(name)))
            last = 0 if len(own) < 2 else max(1, len(own) // 5)
            held_out.append(torch.arange(len(own)) >= len(own) - last)
        labels_S, held_out_S, queries_SD = torch.cat(labels), torch.cat(held_out), torch.cat(list(features.values()))
        if not held_out_S.any():
            raise ValueError(f"no adapter has two pieces of {self.window} tokens to fit keys to; give longer texts")
        self._save(self._keys.fitted(queries_SD, labels_S, held_out_S, steps=steps, learning_rate=learning_rate))
        found = self._scorer(queries_SD[held_out_S].to(self.model.device)).argmax(dim=-1).cpu()
        return (found == labels_S[held_out_S]).double().mean().item()

    def features(self, texts: Sequence[Text]) -> Tensor:
        """The queries of texts, cut into pieces of `window` tokens: (pieces, hidden size) float32 on the CPU.

        What is left over after whole pieces is dropped, unless it is all there is.

        Raises:
            ValueError: there is no text, one that is no list, or strings and no tokenizer.
        """
        if isinstance(texts, (str, Tensor)):
            raise ValueError(f"texts is one {type(texts).__name__}; give a list of texts")
        pieces = []
        for text in texts:
            if isinstance(text, str):
                if self.tokenizer is None:
                    raise ValueError("texts are strings, but the library has no tokenizer; give it one, or token ids")
                ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
            elif text.ndim != 1:
                raise ValueError(f"a text has token ids of shape {tuple(text.shape)}; give each text as (length,)")
            else:
                ids = text.long()
            whole = len(ids) // self.window * self.window
            pieces += list(ids[:whole].split(self.window)) if whole else [ids] if len(ids) else []
        if not pieces:
            raise ValueError("there is no text to make a key from; give at least one that is not empty")
        found = []
        for start in range(0, len(pieces), 16):
            batch = pieces[start : start + 16]
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(piece) for piece in batch], batch_first=True)
            ids = nn.utils.rnn.pad_sequence(batch, batch_first=True)
            found.append(self._queries(ids.to(self.model.device), mask.to(self.model.device)).cpu())
        return torch.cat(found)

    def _queries(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(batch, hidden size) float32: the mean over real tokens after block `layer` of the base model alone."""
        hidden: list[Tensor] = []

        def stop(module: nn.Module, arguments: Any, output: Any) -> None:
            hidden.append(_tensor(output))
            raise _Found

        handle = self._blocks[self.layer - 1].register_forward_hook(stop)
        busy, self._busy = self._busy, True
        try:
            with evaluating(self.model):
                self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        except _Found:
            pass
        finally:
            handle.remove()
            self._busy = busy
        return _mean(hidden[0], attention_mask)

    def retrieve(self, inputs: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, list[list[str]]]:
        """The `top_k` adapters of each sequence.

        Args:
            inputs: token ids (batch, tokens), or hidden states after block `layer` (batch, tokens, hidden size).
            attention_mask: (batch, tokens), nonzero at real tokens.

        Returns:
            weights (batch, min(top_k, adapters)) float32, which sum to one, and the names, both best first.

        Raises:
            ValueError: the library is empty.
        """
        query = _mean(inputs, attention_mask) if inputs.is_floating_point() else self._queries(inputs, attention_mask)
        weights, index = self._choose(query)
        return weights, [[self.names[i] for i in row] for row in index.tolist()]

    def _choose(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and positions of adapters, (..., K), for queries (..., D)."""
        if not self.names:
            raise ValueError(f"{self.folder} has no adapters yet; add some")
        scores, index = self._scorer(query).topk(min(self.top_k, len(self.names)), dim=-1)
        return scores.softmax(dim=-1), index

    def attach(self) -> None:
        """From now on, `model(...)` and `model.generate(...)` use what is retrieved; nothing happens a second time."""
        if self._hooks:
            return
        self._hooks.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._after_forward, with_kwargs=True))
        if self.route == "token":
            self._hooks.append(self._blocks[self.layer - 1].register_forward_hook(self._after_query_block))
        for name, module in self._linear.items():
            self._hooks.append(module.register_forward_hook(self._adding(name)))

    def detach(self) -> None:
        """From now on the model is as it was, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._mix = self._sums = None
        self._prompts.clear()

    def __enter__(self) -> "AdapterLibrary":
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @contextmanager
    def using(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Attached, but with these adapters at these weights for every sequence, whatever it is."""
        self._check_known(weights)
        before, attached = self._fixed, bool(self._hooks)
        self._fixed, self._mix = {name: float(weight) for name, weight in weights.items()}, None
        self.attach()
        try:
            yield
        finally:
            self._fixed = before
            self._mix = None
            if not attached:
                self.detach()

    def _before_forward(self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Choose the adapters of a batch; those of a cached prompt stay."""
        if self._busy:
            return
        given = self._by_name(arguments, options)
        input_ids, mask, past = (given.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        if input_ids is None:
            raise ValueError("the library retrieves by input_ids; pass these, not inputs_embeds")
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; the library needs (batch, tokens)")
        if self._fixed is not None:
            if self._mix is None or len(self._mix.weights) != len(input_ids):
                weights = torch.tensor([list(self._fixed.values())] * len(input_ids), device=input_ids.device)
                index = torch.arange(len(self._fixed), device=input_ids.device).expand(len(input_ids), -1)
                self._mix = Mix([self.cache(name) for name in self._fixed], weights, index)
            return
        self._mix = self._sums = None
        self._mask = None if mask is None else mask[:, -input_ids.shape[1] :]
        if past is not None and past.get_seq_length() > 0:
            self._go_on(self._prompts.get(past), len(input_ids))
        elif self.route == "sequence":
            self._mix = self._mix_of(*self._choose(self._queries(input_ids, mask)))

    def _go_on(self, prompt: Mix | tuple[Tensor, Tensor] | None, batch: int) -> None:
        """Take up what is known of a cached prompt."""
        if prompt is None or len(prompt.weights if isinstance(prompt, Mix) else prompt[0]) != batch:
            raise ValueError(
                f"past_key_values hold a prompt of {batch} sequences whose adapters are not known; read it while the "
                "library is attached, and pass on the cache that this gave, not a copy of it"
            )
        if isinstance(prompt, Mix):
            self._mix = prompt
        else:
            self._sums = prompt

    def _after_forward(
        self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any
    ) -> None:
        """Remember what was chosen, with the cache that holds the prompt."""
        if self._busy or self._fixed is not None:
            return
        past = getattr(output, "past_key_values", None) or self._by_name(arguments, options).get("past_key_values")
        chosen = self._mix if self.route == "sequence" else self._sums
        if past is not None and chosen is not None:
            self._prompts[past] = chosen

    def _by_name(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the model."""
        return dict(zip(self._argument_names, arguments, strict=False)) | options

    def _mix_of(self, weights: Tensor, index: Tensor) -> Mix:
        used, position = index.unique(return_inverse=True)
        return Mix([self.cache(self.names[i]) for i in used.tolist()], weights, position)

    def _after_query_block(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Route "token": choose by the mean hidden state up to each token."""
        if self._busy or self._fixed is not None:
            return
        hidden_BTD = _tensor(output).detach().float()
        mask_BT = hidden_BTD.new_ones(hidden_BTD.shape[:2]) if self._mask is None else self._mask.to(hidden_BTD)
        sums_BTD = (hidden_BTD * mask_BT[..., None]).cumsum(dim=1)
        counts_BT = mask_BT.cumsum(dim=1)
        if self._sums is not None:
            sums_BTD, counts_BT = sums_BTD + self._sums[0][:, None], counts_BT + self._sums[1][:, None]
        self._sums = sums_BTD[:, -1], counts_BT[:, -1]
        weights, index = self._choose(sums_BTD / counts_BT.clamp_min(1)[..., None])
        mix = self._mix_of(weights, index)
        assert mix.index is not None
        shape = (*index.shape[:2], len(mix.adapters))
        mix.weights = torch.zeros(shape, device=weights.device).scatter_add(-1, mix.index, weights)
        mix.index = None
        self._mix = mix

    def _adding(self, name: str) -> Any:
        def add(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            added = None if self._busy or self._mix is None else self._mix.output(name, arguments[0])
            return None if added is None else output + added.to(output.dtype)

        return add

    def _load(self, name: str) -> LoraWeights:
        weights = read_lora(self.folder / name)
        self._check(weights, self.folder / name)
        return weights

    def _check(self, weights: LoraWeights, folder: Path) -> None:
        for path, term in weights.items():
            if path not in self._linear:
                raise UserError(f"{folder} adapts {path}, which is no linear layer of the model; was it trained on it?")
            expected = features_of(self._linear[path], None)
            if (term.down.shape[1], term.up.shape[0]) != expected:
                raise UserError(
                    f"{folder} adapts {path} from {term.down.shape[1]} to {term.up.shape[0]} features, but the model's "
                    f"has {expected[0]} and {expected[1]}; was it trained on it?"
                )

    def _check_known(self, names: Sequence[str] | Mapping[str, Any]) -> None:
        for name in names:
            if name not in self.names:
                raise UserError(f"the library has no adapter {name!r}; it has {listed(self.names)}")


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    number = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of its {number} blocks; the library does not know where to look"
    )


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _mean(hidden_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """(B, D) float32."""
    if mask_BT is None:
        return hidden_BTD.float().mean(dim=1)
    real_BT1 = mask_BT[..., None].to(hidden_BTD.device, torch.float32)
    return (hidden_BTD.float() * real_BT1).sum(dim=1) / real_BT1.sum(dim=1).clamp_min(1)
