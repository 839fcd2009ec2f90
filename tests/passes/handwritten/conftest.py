"""Checks attention modules that people wrote: what becomes of each, in each kind of graph, and that nothing changes."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nsa_compile.rewriting import rewrite

B, T, E, H = 2, 20, 16, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A module, and what becomes of its attentions.

    Attributes:
        make: makes the module.
        expected: name of each attention's reason, "" for one that is rewritten.
        training: likewise in training, where it differs.
        inputs: makes the inputs; hidden states `[B, T, E]` by default.
        seen: what of the output is compared.
    """

    make: Callable[[], nn.Module]
    expected: tuple[str, ...] = ("",)
    training: tuple[str, ...] | None = None
    inputs: Callable[[], tuple[Any, ...]] | None = None
    seen: Callable[[Any], Tensor] = lambda output: output


def hidden_states() -> tuple[Tensor]:
    return (torch.randn(B, T, E, generator=torch.Generator().manual_seed(1)),)


class Handwritten:
    """Makes cases, and checks them."""

    case = Case

    def __init__(self, rewriting: Any) -> None:
        self._rewriting = rewriting

    def _made(self, case: Case) -> tuple[nn.Module, tuple[Any, ...]]:
        torch.manual_seed(0)
        return case.make(), (case.inputs or hidden_states)()

    def check_training(self, case: Case) -> None:
        """The decisions in Dynamo's graph for training, equality of outputs and gradients."""
        module, inputs = self._made(case)
        inputs = pytree.tree_map_only(Tensor, _with_gradient, inputs)
        outcome = self._rewriting.rewrite(module.train(), *inputs, gradients=True, seen=case.seen)
        _assert_as_expected(outcome, case.training or case.expected)

    def check_evaluation(self, case: Case) -> None:
        """The decisions in Dynamo's graph for evaluation under symbolic sizes, equality, and causality."""
        module, inputs = self._made(case)
        module.eval()
        outcome = self._rewriting.rewrite(module, *inputs, seen=case.seen, dynamic=True)
        _assert_as_expected(outcome, case.expected)

    def check_export(self, case: Case, strict: bool) -> None:
        """The decisions in an exported graph, and equality."""
        module, inputs = self._made(case)
        module.eval()
        with torch.no_grad():
            expected = case.seen(module(*copy.deepcopy(inputs)))
            exported = torch.export.export(module, copy.deepcopy(inputs), strict=strict)
            before = str(exported.graph)
            report = rewrite(exported, self._rewriting.covering)
            assert tuple(site.reason for site in report.sites) == case.expected, str(report)
            if "" not in case.expected:
                assert str(exported.graph) == before
                return
            output = case.seen(exported.module()(*copy.deepcopy(inputs)))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=2e-5)

    def check_causality(self, case: Case) -> None:
        """With few blocks selected, later hidden states do not change earlier outputs, and are used."""
        module, (states, *others) = self._made(case)
        config = self._rewriting.covering.replace(num_selected=3)
        changed = states.clone()
        changed[:, 15:] += 1.0
        results = [
            self._rewriting.rewrite(module.eval(), each, *others, config=config, seen=case.seen).output
            for each in (states, changed)
        ]
        torch.testing.assert_close(results[0][:, :15], results[1][:, :15], rtol=0, atol=0)
        assert not torch.equal(results[0][:, 15:], results[1][:, 15:])


def _with_gradient(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def _assert_as_expected(outcome: Any, expected: tuple[str, ...]) -> None:
    assert tuple(outcome.reasons) == expected, _told(outcome.decisions)
    if "" in expected:
        torch.testing.assert_close(outcome.output, outcome.expected, rtol=1e-4, atol=2e-5)
    else:
        assert [graph.print_readable(print_output=False) for graph in outcome.graphs] == outcome.before


def _told(decisions: Any) -> list[Any]:
    return [
        (each.rejection.reason.name, each.rejection.sentence) if each.rejection else each.mask for each in decisions
    ]


@pytest.fixture(scope="session")
def handwritten(rewriting) -> Handwritten:
    return Handwritten(rewriting)
