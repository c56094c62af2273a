"""The chunked divergence against a dense one in plain autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from jaxtyping import TypeCheckError

from distill.losses import DivergenceOutput, cut_share
from neurosig.runtime.errors import UserError
from tests.support.divergences import DIVERGENCES, VocabularyRows, divergence_of, inputs

CLIPS = ("none", "token", "entry")


def cut(output: DivergenceOutput) -> float:
    return cut_share(float(output.loss), float(output.unclipped_loss))


def dense(
    *tensors,
    divergence="forward_kl",
    beta=0.5,
    temperature=1.0,
    clip="none",
    clip_value=0.2,
    softcap=None,
    topk=0,
    tail=True,
):
    """Per-token divergence, clipped and not, and its entries, from the textbook formulas."""

    def probabilities(hidden, weight):
        logits = hidden @ weight.T
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.softmax(logits / temperature, dim=-1)

    student, teacher, head, teacher_head = tensors
    s, t = probabilities(student, head), probabilities(teacher, teacher_head)
    if topk:
        chosen = s.topk(topk, dim=-1).indices
        s, t = (p.gather(-1, chosen) for p in (s, t))
        if tail:
            s, t = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], dim=-1) for p in (s, t))
        else:
            s, t = (p / p.sum(-1, keepdim=True) for p in (s, t))
    m = beta * t + (1 - beta) * s
    entries = {
        "forward_kl": t * torch.log(t / s) - t + s,
        "reverse_kl": s * torch.log(s / t) - s + t,
        "jsd": beta * (t * torch.log(t / m) - t + m) + (1 - beta) * (s * torch.log(s / m) - s + m),
    }[divergence]
    unclipped = entries.sum(-1)
    if clip == "entry":
        return entries.clamp(max=clip_value).sum(-1), unclipped, entries
    if clip == "token":
        return unclipped * (clip_value / unclipped).clamp(max=1).detach(), unclipped, entries
    return unclipped, unclipped, entries


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("divergence", "clip"), itertools.product(DIVERGENCES, CLIPS))
def test_value_and_gradient_equal_dense_autograd(divergence, clip, softcap):
    tensors = inputs()
    weights = torch.rand(13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"divergence": divergence, "beta": 0.3, "temperature": 0.7, "clip": clip, "softcap": softcap}
    if clip == "entry":
        options["clip_value"] = 0.01
    elif clip == "token":  # about half of the tokens
        options["clip_value"] = dense(*tensors, **(options | {"clip": "none"}))[1].mean().item()
    clipped, unclipped, _ = dense(*tensors, **options)
    assert torch.equal(clipped, unclipped) == (clip == "none")
    expected = (weights * clipped).sum()
    expected_gradients = torch.autograd.grad(expected, [tensors[0], tensors[2]])

    output = divergence_of(*tensors, **options, chunk_size=5, weights=weights)
    gradients = torch.autograd.grad(output.loss, [tensors[0], tensors[2]])

    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.per_token, clipped.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(output.unclipped, unclipped.detach(), rtol=0, atol=1e-10)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert expected_gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("divergence", "clip"), itertools.product(DIVERGENCES, CLIPS))
def test_topk_value_and_gradient_equal_dense_autograd(divergence, clip, tail):
    """The student's 5 likeliest of 37 entries, and one for the others or none."""
    options = {"divergence": divergence, "clip": clip, "clip_value": 0.01, "topk": 5, "tail": tail, "beta": 0.3}
    options |= {"temperature": 1.3, "softcap": 2.0}
    tensors = inputs()
    weights = torch.linspace(0, 2, len(tensors[0]), dtype=torch.float64)
    per_token, unclipped, _ = dense(*tensors, **options)
    expected = torch.autograd.grad((weights * per_token).sum(), [tensors[0], tensors[2]])
    output = divergence_of(*tensors, **options, weights=weights, chunk_size=4)
    torch.testing.assert_close(output.per_token[1:], per_token[1:].detach())
    torch.testing.assert_close(output.unclipped[1:], unclipped[1:].detach())
    for gradient, reference in zip(torch.autograd.grad(output.loss, [tensors[0], tensors[2]]), expected, strict=True):
        torch.testing.assert_close(gradient, reference)
    missing = 1 - (weights * per_token).sum().item() / (weights * unclipped).sum().item()
    assert cut(output) == pytest.approx(missing) and (missing == 0) == (clip == "none")
    full = divergence_of(*tensors, divergence=divergence, beta=0.3, temperature=1.3, softcap=2.0, weights=weights)
    torch.testing.assert_close(output.student_entropy, full.student_entropy)
    if tail:  # coarser than the whole vocabulary, so never larger
        assert (output.unclipped <= full.unclipped + 1e-9).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_topk_of_everything_is_the_whole_vocabulary(divergence):
    tensors = inputs()
    full = divergence_of(*tensors, divergence=divergence)
    every = divergence_of(*tensors, divergence=divergence, topk=37, tail=False)
    torch.testing.assert_close(every.per_token, full.per_token)
    for got, wanted in zip(
        torch.autograd.grad(every.loss, [tensors[0], tensors[2]]),
        torch.autograd.grad(full.loss, [tensors[0], tensors[2]]),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_sampled_tokens_estimate_the_reverse_kl():
    """In value and in gradient: their mean over the student's own distribution is that of the whole vocabulary."""
    student, teacher, head, teacher_head = inputs(tokens=1)
    vocab = len(head)
    repeated = student.expand(vocab, -1), teacher.expand(vocab, -1), head, teacher_head
    s = torch.softmax(student @ head.T, dim=-1)[0].detach()
    output = divergence_of(*repeated, divergence="sampled_token", token_ids=torch.arange(vocab), weights=s)
    full = divergence_of(student, teacher, head, teacher_head, divergence="reverse_kl")
    torch.testing.assert_close(output.loss, full.loss)
    for got, wanted in zip(
        torch.autograd.grad(output.loss, [student, head]), torch.autograd.grad(full.loss, [student, head]), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_equals_finite_differences(divergence):
    hidden, teacher, head, teacher_head = inputs(tokens=3, vocab=7)

    def loss(hidden, head):
        return divergence_of(hidden, teacher, head, teacher_head, divergence=divergence, chunk_size=2).loss

    assert torch.autograd.gradcheck(loss, (hidden, head), atol=1e-7)


def test_two_entries_by_hand():
    # heads that pass the hidden state through: student (1/2, 1/2), teacher (3/4, 1/4)
    head = torch.eye(2, dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)

    output = divergence_of(student, teacher, head, head)
    assert output.loss.item() == pytest.approx(forward)
    assert output.student_entropy.item() == pytest.approx(math.log(2))
    assert output.teacher_entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert divergence_of(student, teacher, head, head, divergence="reverse_kl").loss.item() == pytest.approx(reverse)
    # the entries are 0.75 ln 1.5 - 0.25 = 0.054, cut to 0.05, and 0.25 ln 0.5 + 0.25 = 0.077, cut to 0.05
    clipped = divergence_of(student, teacher, head, head, clip="entry", clip_value=0.05)
    assert clipped.per_token.item() == pytest.approx(0.1)
    assert clipped.unclipped.item() == pytest.approx(forward)
    assert cut(clipped) == pytest.approx(1 - 0.1 / forward)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_clip_never_pushes_the_student_from_the_teachers_favourite(divergence):
    """Teacher (.9, .05, .03, .02), student (.1, .6, .2, .1): the favourite's logit must not fall."""
    teacher, student = (
        torch.tensor([p], dtype=torch.float64).log() for p in ([0.9, 0.05, 0.03, 0.02], [0.1, 0.6, 0.2, 0.1])
    )
    head = torch.eye(4, dtype=torch.float64)
    for clip_value in (0.01, 0.05, 0.2, 1.0):
        student.grad = None
        student.requires_grad_()
        output = divergence_of(student, teacher, head, head, divergence=divergence, clip="entry", clip_value=clip_value)
        output.loss.backward()
        assert output.loss.item() > 0
        assert student.grad[0, 0].item() <= 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_clip_lowers_the_loss_and_counts_what_it_cut(divergence):
    tensors = inputs()
    full = divergence_of(*tensors, divergence=divergence)
    clipped = divergence_of(*tensors, divergence=divergence, clip="entry", clip_value=0.01)
    assert cut(full) == 0
    assert cut(clipped) == pytest.approx(1 - (clipped.loss / full.loss).item())
    assert 0 < clipped.loss < full.loss
    torch.testing.assert_close(clipped.unclipped, full.per_token, rtol=0, atol=1e-12)
    high = divergence_of(*tensors, divergence=divergence, clip="entry", clip_value=100.0)
    torch.testing.assert_close(high.loss, full.loss, rtol=0, atol=1e-12)


def test_jsd_tends_to_both_kls():
    tensors = inputs()
    for beta, end in ((1e-5, "forward_kl"), (1 - 1e-5, "reverse_kl")):
        jsd = divergence_of(*tensors, divergence="jsd", beta=beta).loss / min(beta, 1 - beta)
        torch.testing.assert_close(jsd, divergence_of(*tensors, divergence=end).loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", ["none", "entry"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient_at_all(divergence, clip, dtype):
    hidden, _, head, _ = inputs(tokens=40, d_model=24, vocab=501, dtype=dtype)
    output = divergence_of(
        hidden,
        hidden.detach().clone(),
        head,
        head.detach().clone(),
        divergence=divergence,
        clip=clip,
        chunk_size=16,
    )
    gradients = torch.autograd.grad(output.loss, [hidden, head])
    assert output.loss.item() == 0.0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


def test_jsd_of_equal_distributions_is_zero_to_rounding():
    hidden, _, head, _ = inputs(dtype=torch.float32)
    output = divergence_of(hidden, hidden.detach(), head, head.detach(), divergence="jsd", beta=0.3)
    (gradient,) = torch.autograd.grad(output.loss, [hidden])
    assert abs(output.loss.item()) < 1e-5
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_chunk_size_changes_nothing_beyond_rounding(divergence):
    results = []
    for chunk_size in (1, 4, 13, 1000):
        tensors = inputs(dtype=torch.float32)
        output = divergence_of(*tensors, divergence=divergence, clip="entry", chunk_size=chunk_size)
        output.loss.backward()
        missing = torch.tensor(cut(output))
        results.append((output.loss.detach(), output.per_token, missing, tensors[0].grad, tensors[2].grad))
    for other in results[1:]:
        for first, value in zip(results[0], other, strict=True):
            torch.testing.assert_close(value, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_masked_token_contributes_exactly_nothing(divergence):
    weights = torch.ones(13, dtype=torch.float64)
    weights[[0, 6, 12]] = 0
    hidden, teacher, head, teacher_head = inputs()
    poisoned, poisoned_teacher = hidden.detach().clone(), teacher.clone()
    poisoned[weights == 0] = math.nan
    poisoned_teacher[weights == 0] = math.inf
    poisoned.requires_grad_()
    output = divergence_of(
        poisoned,
        poisoned_teacher,
        head,
        teacher_head,
        divergence=divergence,
        weights=weights,
        clip="entry",
        clip_value=0.01,
    )
    gradient, head_gradient = torch.autograd.grad(output.loss, [poisoned, head])

    kept = weights > 0
    options = {"divergence": divergence, "clip": "entry", "clip_value": 0.01}
    alone = divergence_of(hidden[kept], teacher[kept], head, teacher_head, **options)
    expected, expected_head = torch.autograd.grad(alone.loss, [hidden, head])
    for value, reference in ((output.loss, alone.loss), (gradient, expected), (head_gradient, expected_head)):
        assert torch.equal(value, reference)
    assert cut(output) == cut(alone) > 0
    assert output.per_token[~kept].tolist() == [0, 0, 0]


def test_nothing_but_masked_tokens_gives_a_zero_loss_with_a_gradient():
    hidden, *rest = inputs()
    output = divergence_of(hidden, *rest, weights=torch.zeros(13, dtype=torch.float64), clip="entry")
    output.loss.backward()
    assert output.loss.item() == cut(output) == 0
    assert torch.count_nonzero(hidden.grad) == 0


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_stay_finite(divergence, clip):
    head = torch.eye(6)
    student = torch.tensor([[1e4, -1e4, 0, 1, 2, 3], [0.0] * 6, [-1e4] * 5 + [1e4]]).requires_grad_()
    teacher = torch.tensor([[-1e4, 1e4, 0, 1, 2, 3], [1e4, 0, 0, 0, 0, -1e4], [1e4] + [-1e4] * 5])
    output = divergence_of(student, teacher, head, head, divergence=divergence, clip=clip)
    output.loss.backward()
    for tensor in (
        output.loss,
        output.per_token,
        output.teacher_entropy,
        output.student_entropy,
        student.grad,
    ):
        assert torch.isfinite(tensor).all()
    if divergence == "forward_kl" and clip == "none":
        assert output.per_token[0].item() == pytest.approx(2e4)
        assert student.grad[0].tolist() == [1, -1, 0, 0, 0, 0]


def test_the_teacher_gets_no_gradient_even_where_it_shares_the_students_head():
    hidden, teacher, head, _ = inputs()
    teacher.requires_grad_()
    shared = torch.autograd.grad(divergence_of(hidden, teacher, head, head).loss, [head, teacher], allow_unused=True)
    apart = torch.autograd.grad(divergence_of(hidden, teacher, head, head.detach().clone()).loss, [head])
    assert torch.equal(shared[0], apart[0])
    assert shared[1] is None


def test_backward_scales_with_what_comes_from_above():
    hidden, *rest = inputs()
    (once,) = torch.autograd.grad(divergence_of(hidden, *rest).loss, [hidden])
    (thrice,) = torch.autograd.grad(3 * divergence_of(hidden, *rest).loss, [hidden])
    torch.testing.assert_close(thrice, 3 * once)


def test_bfloat16_hidden_states_are_reduced_in_float32():
    tensors = inputs(dtype=torch.bfloat16, vocab=400)
    output = divergence_of(*tensors)
    exact = divergence_of(*(tensor.detach().double() for tensor in tensors))
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), exact.loss, rtol=1e-5, atol=0)
    output.loss.backward()
    assert tensors[0].grad.dtype == tensors[2].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_tensor_holds_more_rows_of_logits_than_a_chunk(divergence):
    tensors = inputs(tokens=96, d_model=4, vocab=1000, dtype=torch.float32)
    with VocabularyRows(1000) as recorded:
        divergence_of(*tensors, divergence=divergence, clip="entry", chunk_size=8).loss.backward()
    assert recorded.rows == 8
    with VocabularyRows(1000) as recorded:
        dense(*tensors, divergence=divergence)
    assert recorded.rows == 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "jsd", "beta": 0.0}, "its ends are forward_kl and reverse_kl"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"clip": "entry", "clip_value": -1.0}, "clip_value is -1.0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"topk": 38}, "topk is 38; choose 0 for the whole vocabulary, or 1 to 37"),
        ({"divergence": "sampled_token"}, "the divergence sampled_token needs token_ids"),
        (
            {"divergence": "sampled_token", "token_ids": torch.arange(13), "topk": 3},
            "it takes no topk and no clip",
        ),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        divergence_of(*inputs(), **options)


def test_unknown_names_and_tensors_that_do_not_fit_together_are_refused():
    for options in ({"divergence": "forward"}, {"clip": "tokens"}):
        with pytest.raises((UserError, TypeCheckError)):  # the type checks of the tests may come first
            divergence_of(*inputs(), **options)
    hidden, teacher, head, teacher_head = inputs()
    for arguments in (
        (hidden, teacher[:5], head, teacher_head),
        (hidden, teacher, head, teacher_head[:30]),
        (hidden, teacher[:, :4], head, teacher_head),
        (hidden, teacher, head.float(), teacher_head),
    ):
        with pytest.raises((UserError, TypeCheckError)):
            divergence_of(*arguments)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.3, "softcap": 2.0}, {"topk": 5}, {"divergence": "sampled_token"}]
)
def test_the_students_log_probability_of_the_sampled_tokens(options):
    hidden, teacher, head, teacher_head = inputs()
    ids = torch.arange(13)
    output = divergence_of(hidden, teacher, head, teacher_head, token_ids=ids, **options)
    logits = hidden @ head.T
    if "softcap" in options:
        logits = 2.0 * torch.tanh(logits / 2.0)
    torch.testing.assert_close(output.student_logprob, torch.log_softmax(logits, -1)[ids, ids].detach())
