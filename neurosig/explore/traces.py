"""Trace texts in one call: which neurons take part in them, and what they do to the next token."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from neurosig.explore.changes import Change, in_force, prompt_of, with_only
from neurosig.explore.forward import Keep, Stream, read_neurons, read_stream
from neurosig.explore.tables import NEURON_COLUMNS, attribution_table, dimension_rows, html, neuron_rows, summary
from neurosig.explore.texts import TextReader, TracedText, find_positions, positions_name
from neurosig.explore.tracing import FEWER, traced, traced_elsewhere, with_values
from neurosig.models.load import LoadedModel
from neurosig.models.prefix import max_positions
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.contributions import ActiveSets
from neurosig.neurons.sites import FFNSites
from neurosig.neurons.tracer import NeuronTracer
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from neurosig.explore.cache import TraceCache
    from neurosig.sampling.sampler import Prompt

T = TypeVar("T")
VALUES_LIMIT = 10**9
"""Bytes of per-token values that are kept unless the user raises the limit."""
BARS_FROM = 20
"""Texts from which a table shows its progress."""


@dataclass(frozen=True, eq=False, repr=False)
class Traces:
    """Texts with their neurons, as `trace` returns them; ``run[3]``, ``run[:10]`` and ``run[[0, 5]]`` are part of it.

    Attributes:
        model: The model that read them.
        texts: The texts, in input order.
        positions: The tokens that were asked for.
        read_at: The tokens that were read, per text indices into ``prompt_ids + completion_ids``.
        site: ``ffn``, ``residual``, ``attention_out`` or a module's path.
        tracer: What traced them; its ``config`` says what was measured.
        notes: What was done otherwise than asked, in sentences.
        changes: The changes of `neurosig.hooks` that were in force; what is computed later computes under them.
    """

    model: LoadedModel
    texts: tuple[TracedText, ...]
    positions: str
    read_at: tuple[Sequence[int], ...]
    site: str
    tracer: NeuronTracer
    notes: tuple[str, ...]
    changes: tuple[Change, ...] = ()
    _sets: ActiveSets | None = None
    _vectors: Float[Tensor, "n layer d"] | None = None
    _values: tuple[Float[Tensor, "layer _ d"], ...] | None = None

    @property
    def sites(self) -> FFNSites:
        """Where the model's FFN neurons are."""
        return self.tracer.sites

    @property
    def config(self) -> TraceConfig:
        """What was measured."""
        return self.tracer.config

    @property
    def sets(self) -> ActiveSets:
        """Active sets of all texts, one row per text.

        Raises:
            UserError: Another site than the FFN's neurons was traced.
        """
        if self._sets is None:
            raise UserError(f"sites={self.site!r} selects no neurons; trace with sites='ffn'")
        return self._sets

    @property
    def vectors(self) -> Float[Tensor, "n layer d"]:
        """Of another site than ``ffn``: its mean over the tokens that were read; one layer of a module's path.

        Raises:
            UserError: The FFN's neurons were traced.
        """
        if self._vectors is None:
            raise UserError("sites='ffn' keeps active sets, which are in sets; vectors are of the other sites")
        return self._vectors

    @property
    def values(self) -> tuple[Float[Tensor, "layer _ d"], ...]:
        """Per text ``[layer, token, d]``, what was read at each of ``read_at``: neuron values, or the site's output.

        In float32, on the CPU.

        With the score ``unembed``, which is about the next token, a token's values are those at the position before it.

        Raises:
            UserError: They were not kept.
        """
        if self._values is None:
            raise UserError("the values of each token were not kept; trace with values=True")
        return self._values

    @cached_property
    def cache(self) -> TraceCache:
        """Activations by TransformerLens' names, such as ``run.cache["blocks.3.hook_resid_post"]``."""
        from neurosig.explore.cache import TraceCache

        return TraceCache(self)

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[Traces]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, which: Any) -> Traces:
        rows = _rows(which, len(self))
        sets = self._sets and ActiveSets(*(tensor[rows] for tensor in self._sets))
        vectors = None if self._vectors is None else self._vectors[rows]
        values = None if self._values is None else tuple(self._values[row] for row in rows)
        texts, read_at = tuple(self.texts[row] for row in rows), tuple(self.read_at[row] for row in rows)
        return replace(self, texts=texts, read_at=read_at, _sets=sets, _vectors=vectors, _values=values)

    def to_frame(self, top: int = 20) -> pd.DataFrame:
        """The largest neurons of each text, or the largest dimensions of another site; neurons run each text once more.

        Args:
            top: Rows per text.

        Returns:
            For ``ffn``: ``text`` (its number), ``layer``, ``neuron``, ``contribution`` (mean over the tokens read, the
            largest first), ``position`` and ``token`` (where the neuron contributes most), ``next_token`` (the one that
            follows there; after a text's last token the one that the model thinks likeliest) and ``effect`` (what the
            neuron adds directly to that token's logit at that position, final norm folded:
            `neurosig.explore.attribution`; NaN where the model's parts cannot be told apart). For another site:
            ``text``, ``layer`` or ``module``, ``dimension`` and ``value`` (mean over the tokens read).
        """
        texts = tqdm(range(len(self)), desc="table", unit="text", disable=len(self) < BARS_FROM, leave=False)
        if self._sets is not None:
            return pd.DataFrame([row for i in texts for row in neuron_rows(self, i, top)], columns=[*NEURON_COLUMNS])
        rows = [row for i in texts for row in dimension_rows(self, i, self.vectors[i], top)]
        where = "layer" if self.vectors.shape[1] > 1 else "module"
        return pd.DataFrame(rows, columns=["text", where, "dimension", "value"])

    def attribution(
        self,
        text: int = 0,
        *,
        position: int | None = None,
        token: int | str | None = None,
        by: str = "sublayers",
        top: int = 20,
    ) -> pd.DataFrame:
        """What each part of the model adds directly to the logit of the next token (direct logit attribution).

        Args:
            text: Which text.
            position: Index into its tokens; default: the prompt's last, which predicts the completion's first.
            token: The token whose logit is meant, as id or as text of one token; default: the one that follows, and
                after the text's last token the likeliest.
            by: ``sublayers``: embedding, attention and FFN of each layer, and the biases of final norm and head, which
                together are the logit. ``neurons``: the ``top`` FFN neurons of all layers by size.
            top: Rows of ``neurons``.

        Returns:
            A table with ``effect`` in units of a logit, before the softcap if the model has one; its ``attrs`` have the
            ``logit``, the ``next_token`` and the ``position``.

        Raises:
            UserError: There is no such position or token, or the model's parts cannot be told apart.
        """
        read = self[text].texts[0]
        place = len(read.prompt_ids) - 1 if position is None else position
        if not -len(read.ids) <= place < len(read.ids):
            raise UserError(f"position {position}: text {text} has tokens 0 to {len(read.ids) - 1}")
        if by not in ("sublayers", "neurons"):
            raise UserError(f"by={by!r}: expected sublayers or neurons")
        number = self._token_id(token)
        return attribution_table(self, text, place % len(read.ids), number, by, top)

    def mean_values(self, neurons: Sequence[tuple[int, int]]) -> Float[Tensor, " kept"]:
        """Mean value of (layer, neuron) pairs over all tokens that were read, act(gate) * up, in float32 on the CPU."""
        by_layer: dict[int, list[int]] = {}
        for layer, neuron in neurons:
            by_layer.setdefault(layer, []).append(neuron)

        def keep(layer: int, value: Tensor, made: Tensor, act: Tensor) -> Tensor:
            return value[:, by_layer.get(layer, [])].double().sum(dim=0).cpu()

        sums = [torch.zeros(len(by_layer.get(layer, [])), dtype=torch.float64) for layer in range(self.sites.n_layers)]
        for i in range(len(self)):
            read = self.neurons(i, keep)
            sums = [total + part for total, part in zip(sums, read, strict=True)]
        count = sum(map(len, self.read_at))
        return torch.tensor([float(sums[layer][by_layer[layer].index(neuron)]) / count for layer, neuron in neurons])

    def value_at(self, text: int) -> list[int]:
        """Where a text's values are read: ``read_at``, or one position earlier for a score of the next token."""
        return [position - self.tracer.about_next for position in self.read_at[text]]

    def neurons(self, text: int, keep: Keep) -> list[Any]:
        """What ``keep`` makes of each layer's neurons at the positions `value_at`; under the changes of this run."""
        at = self.value_at(text)
        return self.within(text, lambda model, ids: read_neurons(model, self.sites, ids, at, keep)).kept

    def stream(self, text: int, at: Sequence[int], keep: Keep | None = None) -> Stream:
        """See `neurosig.explore.forward.read_stream`; under the changes of this run."""
        return self.within(text, lambda model, ids: read_stream(model, self.sites, ids, at, keep))

    def within(self, text: int, read: Callable[[PreTrainedModel, Sequence[int]], T]) -> T:
        """What ``read`` makes of the model and a text's ids, under the changes of this run and no others."""
        one = self.texts[text]
        with with_only(self.model.model, self.changes), prompt_of(self.changes, len(one.prompt_ids)):
            return read(self.model.model, one.ids)

    def __repr__(self) -> str:
        return summary(self)

    def _repr_html_(self) -> str:
        return html(self)

    def _token_id(self, token: int | str | None) -> int | None:
        if not isinstance(token, str):
            vocabulary = self.model.model.get_output_embeddings().weight.shape[0]
            if token is not None and not 0 <= token < vocabulary:
                raise UserError(f"token {token}: the model has tokens 0 to {vocabulary - 1}")
            return token
        ids = self.model.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(f"token {token!r} is {len(ids)} tokens of this model; give one, often with its space first")
        return int(ids[0])


def trace(
    model: LoadedModel,
    texts: Any,
    *,
    positions: Any = "answer",
    sites: str = "ffn",
    values: bool = False,
    values_limit: int = VALUES_LIMIT,
    prompts: Iterable[Prompt] | None = None,
    config: TraceConfig | None = None,
    progress: bool = True,
) -> Traces:
    """Run texts through a model and keep which neurons take part in them.

        >>> import neurosig
        >>> model = neurosig.load_model("smollm2-135m")
        >>> pair = ("The capital of France is", " Paris.")
        >>> run = neurosig.trace(model, [pair, "Who wrote Hamlet?"])
        >>> run.to_frame(top=3)[["text", "layer", "neuron", "token"]].shape
        (6, 4)
        >>> run[0].sets.neuron_ids.shape  # one text, its active set: layer * d_mlp + neuron
        torch.Size([1, 1020])
        >>> table = run.attribution(0)  # parts of the logit of " Paris" at the prompt's end
        >>> abs(float(table["effect"].sum()) - table.attrs["logit"]) < 1e-3
        True

    Special tokens: a prompt gets those that the tokenizer puts before a text (BOS) once, and none after it; a
    completion is tokenised on its own and gets none; a chat has those of its template. The first token of a sequence
    runs but is never read: it is BOS, or sees only itself, and its values would drown all others.

    Args:
        model: What `neurosig.load_model` returns.
        texts: One or many of: a text, which is a prompt without completion; a ``(prompt, completion)`` tuple; a chat,
            a list of ``{"role": ..., "content": ...}``, whose last message is the completion if the assistant wrote
            it; a `Rollout` of ``prompts``; or a tuple of any of these prompts and a `Rollout`.
        positions: Which tokens are read, the contribution being their mean: ``answer`` (the completion after its
            thought), ``statement`` (the sentence that states the answer), ``answer_words``, ``thought``, ``all`` (the
            completion), ``answer_start``, ``prompt_end``, ``prompt``, or numbers and ranges of the completion's tokens
            (``0``, ``-1``, ``[0, 3]``, ``"0:3"``). A text without completion is read at its prompt, a completion
            without such a token at its answer; ``run.notes`` and ``repr(run)`` say how many.
        sites: ``ffn``: the FFN neurons, the only site that selects an active set. ``residual``: the stream after each
            block. ``attention_out``: what each attention adds to it. Or the path of any module, such as
            ``model.layers.3.mlp.gate_proj``: its output.
        values: Keep what is read at each token, in ``run.values``: for ``ffn`` layers * d_mlp * 4 bytes per token
            (184 kB in SmolLM2-135M, 1.4 MB in Qwen3-4B).
        values_limit: Most bytes of them.
        prompts: The prompts of rollouts, as `neurosig.sample` got them.
        config: What a contribution is and how large an active set; default `TraceConfig()`.
        progress: Show a bar from the second second on.

    Returns:
        Traces. Contributions have no unit: the share of the FFN output's norm (``cett``).

    Raises:
        UserError: A text is none of the above, empty or beyond the model's context; no such site or positions; or the
            values would exceed ``values_limit``.
        TraceInterrupted: Ctrl-C; its ``traces`` has the texts that were finished.
    """
    check_model(model)
    name = positions_name(positions)
    read = TextReader(model.tokenizer, prompts).read(texts)
    tracer = NeuronTracer(model.model, config)
    _check_site(model, sites)
    about_next = tracer.about_next and sites == "ffn"
    at, notes = find_positions(read, name, model.tokenizer, about_next=about_next)
    if about_next is not tracer.about_next:
        tracer = NeuronTracer(model.model)
    run = Traces(model, read, name, tuple(at), sites, tracer, notes, in_force(model.model))
    _check_length(run)
    if values:
        _check_values(run, values_limit)
    if sites != "ffn":
        return traced_elsewhere(run, values_limit if values else None, progress)
    run = traced(run, progress)
    return with_values(run, progress) if values else run


def _rows(which: Any, count: int) -> list[int]:
    """The rows that an index, a slice, a list of indices or a mask names."""
    if isinstance(which, slice):
        return list(range(count))[which]
    given = which.tolist() if hasattr(which, "tolist") else which
    given = list(given) if isinstance(given, Iterable) else [given]
    if given and all(isinstance(one, bool) for one in given):
        if len(given) != count:
            raise UserError(f"a mask of {len(given)} for {count} texts; give one flag per text")
        given = [index for index, wanted in enumerate(given) if wanted]
    return [range(count)[index] for index in given]


def check_model(model: Any) -> None:
    """Refuse what is no `LoadedModel`."""
    if not isinstance(model, LoadedModel):
        raise UserError(f"model: expected what neurosig.load_model returns, got {type(model).__name__}")


def _check_site(model: LoadedModel, site: str) -> None:
    if site in ("ffn", "residual", "attention_out"):
        return
    names = [name for name, _ in model.model.named_modules() if name]
    if site not in names:
        near = difflib.get_close_matches(str(site), ["ffn", "residual", "attention_out", *names], n=3, cutoff=0.3)
        raise UserError(
            f"sites={site!r}: no such module; expected ffn, residual, attention_out or a path, such as "
            f"{', '.join(near or names[:3])}"
        )


def _check_length(run: Traces) -> None:
    longest = max_positions(run.model.model)
    for index, text in enumerate(run.texts):
        if len(text.ids) > longest:
            raise UserError(f"text {index}: {len(text.ids)} tokens; the model reads {longest}, cut it short")


def _check_values(run: Traces, limit: int) -> None:
    sites, tokens = run.sites, sum(map(len, run.read_at))
    per_token = 4 * sites.n_layers * (sites.d_mlp if run.site == "ffn" else sites.d_model)
    if run.site in ("ffn", "residual", "attention_out") and tokens * per_token > limit:
        raise UserError(
            f"values: {tokens} tokens of {per_token} bytes are {tokens * per_token / 1e9:.2f} GB, more than "
            f"values_limit={limit}; {FEWER}"
        )
