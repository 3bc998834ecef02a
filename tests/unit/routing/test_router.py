"""Scores of few experts, in the form that a compiler fuses."""

import pytest
import torch

from routing import LinearRouter


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("experts", [1, 4, 8, 9])
def test_scores_as_sums_are_the_scores_of_a_product(monkeypatch, experts, bias):
    torch.manual_seed(0)
    linear = LinearRouter(bias=bias, std=0.5).build(24, experts).network
    x, grad = torch.randn(2, 5, 24), torch.randn(2, 5, experts)
    results, products, product = [], [], torch.nn.functional.linear
    for compiles in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiles=compiles: compiles)
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: products.append(given) or product(*given))
        linear.zero_grad()
        given = x.clone().requires_grad_()
        scores = linear(given)
        scores.backward(grad)
        results.append([scores.detach(), given.grad, *(p.grad for p in linear.parameters())])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    assert len(products) == (1 if experts <= 8 else 2)
