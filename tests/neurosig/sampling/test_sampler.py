from __future__ import annotations

import json
from itertools import cycle, islice
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

import neurosig.sampling.kv_cache
import neurosig.sampling.sampler
from neurosig.models.load import LoadedModel, load_model
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.next_token import choose, penalised, seen_tokens
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample
from tests.support.architectures import model_of
from tests.support.tiny import ARCHS, EOS_ID, VOCAB_SIZE, Arch, OtherArch, tiny_model, tiny_tokenizer

LENGTHS = (5, 12, 9, 12, 3)


def loaded(arch: Arch | OtherArch = "qwen3") -> LoadedModel:
    return load_model((tiny_model(arch), tiny_tokenizer()))


def often_ending(arch: Arch | OtherArch = "qwen3") -> LoadedModel:
    """A model that ends about one completion in eight at every step."""
    model = tiny_model(arch)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[EOS_ID] *= 3
    return load_model((model, tiny_tokenizer()))


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    return [
        Prompt(f"q{index}", tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()))
        for index, n in enumerate(lengths)
    ]


def draw(model: LoadedModel, todo: list[Prompt], **options: Any) -> dict[str, list[Rollout]]:
    extra = {key: options.pop(key) for key in ("batch_rows", "compile_decoding", "salt", "done") if key in options}
    config = SamplingConfig(**{"num_generations": 4, "temperature": 1.0, "max_new_tokens": 10, **options})
    return {group[0].question_id: group for group in sample(model, todo, config, **extra)}


def tokens(groups: dict[str, list[Rollout]]) -> dict[str, list[tuple[int, ...]]]:
    return {name: [rollout.completion_ids for rollout in group] for name, group in groups.items()}


def generated(model: LoadedModel, prompt: Prompt, **options: Any) -> list[tuple[int, ...]]:
    """What transformers' `generate` says, up to the closing token of each sequence."""
    with torch.no_grad():
        rows = model.model.generate(
            torch.tensor([prompt.token_ids]), pad_token_id=0, eos_token_id=list(model.eos_token_ids), **options
        )
    completions = rows[:, len(prompt.token_ids) :].tolist()
    ends = [next((n for n, token in enumerate(row) if token in model.eos_token_ids), len(row)) for row in completions]
    return [tuple(row[: end + 1]) for row, end in zip(completions, ends, strict=True)]


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_equals_generate_token_for_token(arch: Arch) -> None:
    """Mixed prompt lengths in one batch, beyond gemma3's sliding window, against one `generate` a prompt."""
    model = loaded(arch)
    ours = draw(model, prompts(), temperature=0.0, num_generations=2, max_new_tokens=12)
    for prompt in prompts():
        (reference,) = generated(model, prompt, do_sample=False, max_new_tokens=12)
        for rollout in ours[prompt.question_id]:
            assert rollout.completion_ids == reference


@pytest.fixture
def refills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever new rows enter a batch: the number of rows that are decoding at that moment."""
    admit, seen = neurosig.sampling.sampler._Batch.admit, []

    def counted(self: Any, questions: range) -> None:
        seen.append(self.decoding)
        admit(self, questions)

    monkeypatch.setattr(neurosig.sampling.sampler._Batch, "admit", counted)
    return seen


@pytest.mark.parametrize("arch", [*ARCHS, "mistral", "qwen3_5_text", "bloom", "falcon, ALiBi"])
def test_greedy_equals_generate_in_a_refilled_batch(
    arch: str, refills: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newcomers of other lengths take the places of finished rows, and columns are dropped on the left and added."""
    monkeypatch.setattr(neurosig.sampling.kv_cache, "ROOM", 2)
    monkeypatch.setattr(neurosig.sampling.sampler, "WINDOW", 100)
    moves: list[int] = []
    shift = neurosig.sampling.kv_cache.RowCache.shift

    def recorded(self: Any, columns: int) -> None:
        moves.append(columns)
        shift(self, columns)

    monkeypatch.setattr(neurosig.sampling.kv_cache.RowCache, "shift", recorded)
    model = loaded(arch) if arch in ARCHS else load_model((model_of(arch), tiny_tokenizer()))
    model.model.generation_config.eos_token_id = list(range(EOS_ID, VOCAB_SIZE, 8))
    todo = prompts((4,) * 12 + (9,) * 12 + (30, 40))
    options = {"max_new_tokens": 16, "repetition_penalty": 1.5}  # the penalty keeps the lengths apart
    ours = draw(model, todo, temperature=0.0, num_generations=2, batch_rows=6, **options)
    assert sum(decoding > 0 for decoding in refills) >= 2
    assert min(moves) < 0 < max(moves)
    for prompt in todo:
        (reference,) = generated(model, prompt, do_sample=False, **options)
        assert [rollout.completion_ids for rollout in ours[prompt.question_id]] == [reference, reference]


def counts(rollouts: list[tuple[int, ...]], cells: dict[tuple[int, ...], int]) -> np.ndarray:
    """How often each pair of first tokens occurs; ``cells`` numbers the pairs and grows."""
    found = [cells.setdefault(ids[:2], len(cells)) for ids in rollouts]
    return np.bincount(found, minlength=len(cells))


def test_a_refilled_batch_samples_as_generate_does(refills: list[int]) -> None:
    """First two tokens jointly, a two-sample chi-square test; another temperature is found out."""
    model = often_ending()
    pair = prompts((4, 9))
    todo = [Prompt(f"{kind.question_id}-{n}", kind.token_ids) for n, kind in enumerate(islice(cycle(pair), 240))]
    options = {"num_generations": 8, "max_new_tokens": 12, "top_k": 4}
    ours = tokens(draw(model, todo, batch_rows=40, **options))
    assert sum(decoding > 0 for decoding in refills) > len(refills) / 2
    torch.manual_seed(0)
    for kind in pair:
        own_ids = [ids for name, group in ours.items() if name.startswith(kind.question_id) for ids in group]
        assert len(own_ids) == 960
        pvalues = {}
        for temperature in (1.0, 0.5):
            generated_ids = generated(
                model, kind, do_sample=True, max_new_tokens=2, num_return_sequences=4000,
                temperature=temperature, top_k=4, top_p=1.0,
            )  # fmt: skip
            cells: dict[tuple[int, ...], int] = {}
            expected, found = counts(generated_ids, cells), counts(own_ids, cells)
            assert len(found) == len(expected) and len(expected) > 8  # no pair that `generate` never says
            pvalues[temperature] = stats.chi2_contingency(np.stack([expected, found])).pvalue
        assert pvalues[1.0] > 0.01
        assert pvalues[0.5] < 1e-6


@pytest.mark.parametrize("batch_rows", [1, 8, 12])
def test_the_batch_does_not_matter(batch_rows: int) -> None:
    model = often_ending()
    assert tokens(draw(model, prompts(), batch_rows=batch_rows)) == tokens(draw(model, prompts()))
    assert tokens(draw(model, prompts()[2:3])) == {"q2": tokens(draw(model, prompts()))["q2"]}


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_of_every_architecture_leave_the_batch_alone(arch: Arch) -> None:
    """Caches differ (gemma3 keeps a window of 8): rows that end and neighbours of other lengths change nothing."""
    model = often_ending(arch)
    options: dict[str, Any] = {"num_generations": 6, "max_new_tokens": 14, "repetition_penalty": 1.5}
    together = tokens(draw(model, prompts(), **options))
    lengths = [len(ids) for group in together.values() for ids in group]
    assert sum(length < 14 for length in lengths) > len(lengths) / 4  # enough to shrink the batch more than once
    for prompt in prompts():
        assert tokens(draw(model, [prompt], **options))[prompt.question_id] == together[prompt.question_id]


def test_every_question_seed_and_salt_draws_its_own_numbers() -> None:
    model, todo = loaded(), [Prompt("a", (5, 6, 7)), Prompt("b", (5, 6, 7))]
    first = tokens(draw(model, todo))
    assert first == tokens(draw(model, todo))
    assert len({*first["a"], *first["b"]}) == 8
    assert first != tokens(draw(model, todo, seed=1))
    assert first != tokens(draw(model, todo, salt="step1"))


def test_one_candidate_left_is_greedy() -> None:
    model = loaded()
    greedy = tokens(draw(model, prompts(), temperature=0.0))
    assert tokens(draw(model, prompts(), top_k=1)) == greedy
    assert tokens(draw(model, prompts(), top_p=1e-6)) == greedy
    assert tokens(draw(model, prompts(), temperature=1e-4)) == greedy


def test_any_of_several_end_tokens_ends_a_rollout() -> None:
    model = loaded()
    with torch.no_grad():
        first = model.model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax().item()
    model.model.generation_config.eos_token_id = [EOS_ID, first]
    (rollout,) = draw(model, [Prompt("a", (5, 6, 7))], temperature=0.0, num_generations=1)["a"]
    assert (rollout.completion_ids, rollout.finish_reason, rollout.text) == ((first,), "stop", "")
    assert rollout.completion_ids_without_eos == (first,)  # it has no other token


def test_rows_that_end_leave_the_others_as_they_are() -> None:
    model = often_ending()
    groups = draw(model, prompts(), num_generations=16, max_new_tokens=20)
    lengths = [len(rollout.completion_ids) for group in groups.values() for rollout in group]
    assert min(lengths) < 5 and max(lengths) == 20
    for group in groups.values():
        for rollout in group:
            ended = rollout.completion_ids[-1] == EOS_ID
            assert rollout.finish_reason == ("stop" if ended else "length")
            assert EOS_ID not in rollout.completion_ids[:-1]
            expected = (
                rollout.completion_ids[:-1] if ended and len(rollout.completion_ids) > 1 else rollout.completion_ids
            )
            assert rollout.completion_ids_without_eos == expected
            assert rollout.text == model.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)


def test_a_thought_keeps_its_marks_where_the_tokenizer_calls_them_special() -> None:
    """Without them the thought would read like the answer."""
    model = loaded()
    fillers = [model.tokenizer.convert_tokens_to_ids(f"<|unused_{n}|>") for n in (298, 299)]
    backend = json.loads(model.tokenizer.backend_tokenizer.to_str())
    for token, mark in zip(fillers, ("<think>", "</think>"), strict=True):
        backend["model"]["vocab"] = {mark if i == token else name: i for name, i in backend["model"]["vocab"].items()}
    thinking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<|im_end|>")
    thinking.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert [thinking.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>")] == fillers
    hm, yes = (thinking("Hm: no.")["input_ids"], thinking("Yes.")["input_ids"])
    script = [fillers[0], *hm, fillers[1], *yes, EOS_ID]
    rows, forced = torch.eye(VOCAB_SIZE), iter(script)

    def next_logits(module: Any, args: Any, output: Any) -> Any:
        output.logits = rows[next(forced)].expand_as(output.logits) * 100
        return output

    model.model.register_forward_hook(next_logits)
    served = LoadedModel(model.model, thinking, model.info)
    [rollout] = draw(served, [Prompt("a", (5, 6))], num_generations=1, max_new_tokens=20)["a"]
    assert rollout.completion_ids == tuple(script)
    assert rollout.text == "<think>Hm: no.</think>Yes."
    assert AnswerReader().extract(rollout.text, "stop", Question("a", "d", "Is it?")) == "yes"


def test_log_probabilities_and_entropies_are_those_of_a_plain_forward() -> None:
    model = often_ending()
    groups = draw(model, prompts(), temperature=0.7, top_p=0.9)
    for prompt in prompts():
        for rollout in groups[prompt.question_id]:
            with torch.no_grad():
                logits = model.model(torch.tensor([[*prompt.token_ids, *rollout.completion_ids]])).logits[0].double()
            log_p = logits[len(prompt.token_ids) - 1 : -1].log_softmax(-1)
            chosen = log_p.gather(1, torch.tensor(rollout.completion_ids)[:, None])
            assert rollout.mean_logprob == pytest.approx(chosen.mean().item(), abs=1e-4)
            assert rollout.mean_entropy == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_softmax(temperature: float) -> None:
    model = loaded()
    drawn = draw(model, [Prompt("a", (5, 6, 7))], num_generations=4000, max_new_tokens=1, temperature=temperature)["a"]
    with torch.no_grad():
        logits = model.model(torch.tensor([[5, 6, 7]])).logits[0, -1].double()
    expected = 4000 * (logits / temperature).softmax(-1).numpy()
    counts = np.bincount([rollout.completion_ids[0] for rollout in drawn], minlength=VOCAB_SIZE)
    often = expected >= 5
    table = np.append(counts[often], counts[~often].sum()), np.append(expected[often], expected[~often].sum())
    assert stats.chisquare(*table).pvalue > 0.01


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_k": 7}, {"top_p": 0.3}, {"top_p": 0.9}, {"top_k": 9, "top_p": 0.5}]
)
def test_top_k_and_top_p_keep_what_transformers_keeps(options: dict[str, Any]) -> None:
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    kept = scores
    if "top_k" in options:
        kept = TopKLogitsWarper(options["top_k"])(None, kept)
    if "top_p" in options:
        kept = TopPLogitsWarper(options["top_p"])(None, kept)
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    chosen = choose(scores.expand(20_000, -1), uniform, SamplingConfig(temperature=1.0, **options))
    share = chosen.bincount(minlength=50) / 20_000
    torch.testing.assert_close(share, kept.softmax(-1)[0], atol=2e-4, rtol=0)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    ids, mask = torch.tensor([[0, 0, 4, 7], [9, 4, 4, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    seen = seen_tokens(ids, mask, 20, 2)
    ours = penalised(logits, logits.log_softmax(-1), seen, SamplingConfig(repetition_penalty=1.7))
    penalty = RepetitionPenaltyLogitsProcessor(1.7)
    for row, ids in enumerate(([4, 7], [4, 7], [9, 4, 4, 8], [9, 4, 4, 8])):
        torch.testing.assert_close(ours[row], penalty(torch.tensor([ids]), logits[[row]])[0])


def test_a_penalty_reaches_the_completion() -> None:
    (rollout,) = draw(loaded(), prompts((6,)), temperature=0.0, num_generations=1, max_new_tokens=30)["q0"]
    (varied,) = draw(
        loaded(), prompts((6,)), temperature=0.0, num_generations=1, max_new_tokens=30, repetition_penalty=50.0
    )["q0"]
    assert len(set(varied.completion_ids)) == len(varied.completion_ids)
    assert len(set(rollout.completion_ids)) < len(rollout.completion_ids)


def test_the_models_own_generation_config_leaks_nothing() -> None:
    plain, opinionated = loaded(), loaded()
    opinionated.model.generation_config.update(temperature=0.1, top_k=1, top_p=0.2, repetition_penalty=5.0)
    assert tokens(draw(plain, prompts())) == tokens(draw(opinionated, prompts()))


def test_an_interrupted_call_goes_on_window_by_window(refills: list[int]) -> None:
    """To the last bit, and without saying twice what is done."""
    model = often_ending()
    todo = prompts((3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14))
    everything = draw(model, todo, batch_rows=4, max_new_tokens=20)
    order = list(everything)
    assert set(order[:4]) == {"q0", "q1", "q2", "q3"}  # four batches of a question each are a window
    for stopped_after in (3, 4, 6, 11):
        refills.clear()
        rest = draw(model, todo, batch_rows=4, max_new_tokens=20, done=set(order[:stopped_after]))
        assert list(rest.items()) == list(everything.items())[stopped_after:]
        assert len(refills) == 12 - stopped_after // 4 * 4  # what is decoded: the windows that are not done


def test_prompts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="a prompt of 12 tokens and --max-new-tokens 505 exceed its 512 positions"):
        draw(loaded(), prompts(), max_new_tokens=505)


def test_logits_that_are_not_finite_name_the_question_and_the_layer() -> None:
    """NaN in the head, NaN in a layer before it, and weights too large for their arithmetic."""
    for name, value, why in (
        ("lm_head", torch.nan, "its weight holds NaN or infinity"),
        ("model.layers.1.mlp.down_proj", torch.nan, "its weight holds NaN or infinity"),
        ("model.layers.0.mlp.up_proj", 3e38, "in float32"),
    ):
        model = loaded()
        with torch.no_grad():
            model.model.get_submodule(name).weight[5] = value
        with pytest.raises(UserError) as caught:
            draw(model, prompts())
        assert 'logits are not finite while sampling question "q' in str(caught.value)
        assert f"; the first layer is {name} ({why}); get intact weights" in str(caught.value)
        assert not any(module._forward_hooks for module in model.model.modules())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_generations", 0),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_k", -1),
        ("max_new_tokens", 0),
        ("repetition_penalty", 0.0),
        ("temperature", float("nan")),
        ("top_p", 1.01),
    ],
)
def test_options_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name.replace('_', '-')}: expected .*, got {value}"):
        SamplingConfig(**{name: value})
