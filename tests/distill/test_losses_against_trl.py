"""The chunked divergence against TRL."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support.divergences import DIVERGENCES, divergence_of, inputs


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.sdft import loss_utils

    return SimpleNamespace(
        generalized_jsd_loss=GKDTrainer.generalized_jsd_loss,
        sdft_loss=loss_utils.compute_full_logit_self_distillation_loss,
        sdft_topk=loss_utils.compute_topk_self_distillation_loss,
        sdft_sampled=loss_utils.compute_sampled_token_self_distillation_loss,
    )


TRL_BETA = {"forward_kl": 0.0, "jsd": 0.3, "reverse_kl": 1.0}


@pytest.mark.parametrize("temperature", [1.0, 1.1])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_equal_trl(trl, divergence, temperature):
    beta = TRL_BETA[divergence]
    hidden, teacher, head, teacher_head = inputs(tokens=24, vocab=300, dtype=torch.float32)
    labels = torch.zeros(2, 12, dtype=torch.long)
    labels[0, :3] = labels[1, 9:] = -100  # TRL's mask; its loss is the mean over the other tokens
    kept = labels.flatten() != -100

    logits, teacher_logits = (hidden @ head.T).view(2, 12, -1), (teacher @ teacher_head.T).view(2, 12, -1)
    expected = trl.generalized_jsd_loss(
        logits, teacher_logits.detach(), labels=labels, beta=beta, temperature=temperature
    )
    expected_gradients = torch.autograd.grad(expected, [hidden, head])
    output = divergence_of(
        *(hidden, teacher, head, teacher_head),
        **{"divergence": divergence, "beta": 0.3, "temperature": temperature, "chunk_size": 7},
        weights=kept / kept.sum(),
    )
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-5)
    for gradient, reference in zip(torch.autograd.grad(output.loss, [hidden, head]), expected_gradients, strict=True):
        assert (gradient - reference).norm() < 1e-4 * reference.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_per_token_values_equal_trl_self_distillation(trl, divergence):
    hidden, teacher, head, teacher_head = inputs(tokens=10, vocab=300, dtype=torch.float32)
    expected = trl.sdft_loss(hidden @ head.T, teacher @ teacher_head.T, distillation_alpha=TRL_BETA[divergence])
    output = divergence_of(hidden, teacher, head, teacher_head, divergence=divergence, beta=0.3)
    torch.testing.assert_close(output.per_token, expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_topk_equals_trl_self_distillation(trl, divergence, tail):
    hidden, teacher, head, teacher_head = inputs(tokens=10, vocab=300, dtype=torch.float32)
    expected = trl.sdft_topk(
        hidden @ head.T,
        (teacher @ teacher_head.T).detach(),
        distillation_topk=20,
        distillation_alpha=TRL_BETA[divergence],
        distillation_add_tail=tail,
    )
    output = divergence_of(*(hidden, teacher, head, teacher_head), divergence=divergence, beta=0.3, topk=20, tail=tail)
    torch.testing.assert_close(output.per_token, expected.detach(), rtol=0, atol=1e-5)
    expected_gradients = torch.autograd.grad(expected.sum(), [hidden, head])
    for gradient, reference in zip(torch.autograd.grad(output.loss, [hidden, head]), expected_gradients, strict=True):
        assert (gradient - reference).norm() < 1e-4 * reference.norm()


def test_sampled_token_gradient_equals_trl_self_distillation(trl):
    """TRL's value is the ratio times the log-probability, whose gradient is meant; ours is the ratio itself."""
    hidden, teacher, head, teacher_head = inputs(tokens=10, vocab=300, dtype=torch.float32)
    ids = torch.arange(10) * 29
    expected = trl.sdft_sampled(hidden @ head.T, (teacher @ teacher_head.T).detach(), ids, distillation_alpha=1.0)
    output = divergence_of(
        *(hidden, teacher, head, teacher_head), divergence="sampled_token", token_ids=ids, chunk_size=3
    )
    expected_gradients = torch.autograd.grad(expected.sum(), [hidden, head])
    for gradient, reference in zip(torch.autograd.grad(output.loss, [hidden, head]), expected_gradients, strict=True):
        assert (gradient - reference).norm() < 1e-4 * reference.norm()
