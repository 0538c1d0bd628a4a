"""A library of LoRA adapters on disk: each sequence or token retrieves its own by learned keys, and mixes them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peerlm.adapters.library.attached import ROUTES, Attached
from peerlm.adapters.library.base import BaseModel, mean_of_tokens
from peerlm.adapters.library.cache import AdapterCache
from peerlm.adapters.library.folder import copy_adapter, open_folder
from peerlm.adapters.library.keys import Keys
from peerlm.adapters.library.lora_files import LoraWeights, read_lora
from peerlm.adapters.library.manifest import Manifest, check_name, write_manifest
from peerlm.adapters.library.pieces import Text, pieces_of
from peerlm.errors import UserError, listed
from peerlm.marks import AUTO, marks_of


class AdapterLibrary:
    """Separately trained LoRA adapters of one frozen model, retrieved by keys and mixed by softmax weights.

    The query of a sequence is the mean hidden state of its tokens after block `layer` of the base model. The key of an
    adapter is that of texts like those it was trained on; `keys.py` says how they are compared. Adapters lie in
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
        document_start: what stands before each piece of a text given as a string, as it does before a prompt: "auto",
            "none" or a token (see `peerlm.marks`).

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
        document_start: str = AUTO,
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
        self.window = window
        self._start = () if tokenizer is None else marks_of(model, tokenizer, document_start).prompt_start
        if len(self._start) >= window:
            raise ValueError(f"window is {window}, but {len(self._start)} tokens begin each piece; take more")
        self.cache = AdapterCache(self._load, cache_bytes)
        self._base = BaseModel(model)
        manifest = open_folder(self.folder, self._base, layer)
        self.layer = manifest.layer
        self._attached = Attached(
            self._base,
            layer=self.layer,
            route=route,
            choose=self._choose,
            by_position=lambda position: self.cache(self.names[position]),
            by_name=self.cache,
        )
        self._set_keys(manifest.keys)

    def _set_keys(self, keys: Keys) -> None:
        self._keys = keys
        self._scorer = keys.scorer().to(self.model.device)
        self._attached.forget()

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
        self._base.check_adapts(read_lora(source), source)
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
            copy_adapter(source, self.folder, name)
        self._save(keys)
        return name

    def remove(self, name: str) -> None:
        """Take an adapter out of the library and save it; the adapter's own folder stays."""
        self._check_known([name])
        self.cache.forget(name)
        self._save(self._keys.without(name))

    def fit_keys(self, texts: Mapping[str, Sequence[Text]], *, steps: int = 100, learning_rate: float = 0.05) -> float:
        """Make keys again from texts whose adapters are known, fit them and the softmax's temperature, and save.

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

        What is left over after whole pieces is dropped, unless it is all there is. A piece of a string begins as a
        prompt does, with `document_start`; token ids are taken as they are.

        Raises:
            ValueError: there is no text, one that is no list, or strings and no tokenizer.
        """
        pieces = pieces_of(texts, self.tokenizer, window=self.window, start=self._start)
        found = []
        for place in range(0, len(pieces), 16):
            batch = pieces[place : place + 16]
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(piece) for piece in batch], batch_first=True)
            ids = nn.utils.rnn.pad_sequence(batch, batch_first=True)
            found.append(self._queries(ids.to(self.model.device), mask.to(self.model.device)).cpu())
        return torch.cat(found)

    def _queries(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self._base.queries(self.layer, input_ids, attention_mask)

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
        query_of = mean_of_tokens if inputs.is_floating_point() else self._queries
        weights, index = self._choose(query_of(inputs, attention_mask))
        return weights, [[self.names[i] for i in row] for row in index.tolist()]

    def _choose(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and positions of adapters, (..., K), for queries (..., D)."""
        if not self.names:
            raise ValueError(f"{self.folder} has no adapters yet; add some")
        scores, index = self._scorer(query).topk(min(self.top_k, len(self.names)), dim=-1)
        return scores.softmax(dim=-1), index

    def attach(self) -> None:
        """From now on, `model(...)` and `model.generate(...)` use what is retrieved; nothing happens a second time."""
        self._attached.attach()

    def detach(self) -> None:
        """From now on the model is as it was, bit for bit."""
        self._attached.detach()

    def __enter__(self) -> "AdapterLibrary":
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @contextmanager
    def using(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Attached, but with these adapters at these weights for every sequence."""
        self._check_known(weights)
        with self._attached.using({name: float(weight) for name, weight in weights.items()}):
            yield

    def _load(self, name: str) -> LoraWeights:
        weights = read_lora(self.folder / name)
        self._base.check_adapts(weights, self.folder / name)
        return weights

    def _check_known(self, names: Sequence[str] | Mapping[str, Any]) -> None:
        for name in names:
            if name not in self.names:
                raise UserError(f"the library has no adapter {name!r}; it has {listed(self.names)}")
