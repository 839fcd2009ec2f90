"""Random mask programs: whatever the prover accepts is exactly what the program computes, at several sizes."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from nsa_compile.passes.sites import Rejection

NEG = float("-inf")
HEADS = 3
INPUTS = ("query", "key", "padding", "flags", "ids", "positions", "lengths", "offset", "square", "head")


def make_inputs(batch, queries, keys, seed):
    """Random data for a program; sums and positions are made of small numbers, so that equal ones occur."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    return (
        torch.randn(batch, HEADS, queries, 4, generator=generator),
        torch.randn(batch, HEADS, keys, 4, generator=generator),
        integers(-1, 3, batch, keys),
        integers(0, 4, batch, keys) > 0,
        integers(0, 3, batch, keys),
        integers(0, keys, batch, keys),
        integers(0, keys + 1, batch),
        integers(0, 4),
        integers(0, 3, batch, 1, queries, keys) > 0,
        integers(0, 2, HEADS) > 0,
    )


class Program:
    """Evaluates a tree of operations on tensors that broadcast to `[B, H, T, S]`."""

    def __init__(self, inputs):
        self.data = dict(zip(INPUTS, inputs, strict=True))
        self.queries, self.keys = self.data["query"].shape[2], self.data["key"].shape[2]

    def run(self, tree):
        name, *arguments = tree
        return getattr(self, name)(*arguments)

    # Numbers.
    def query(self):
        return torch.arange(self.queries)[:, None]

    def key(self):
        return torch.arange(self.keys)[None, :]

    def constant(self, value):
        return torch.tensor(value)

    def offset(self):
        return self.data["offset"]

    def length(self):
        return self.data["lengths"][:, None, None, None]

    def of_key(self, name):
        return self._numbers(name)[:, None, None, :]

    def of_query(self, name):
        numbers = self._numbers(name)
        return numbers[:, None, : self.queries, None] if self.queries <= self.keys else numbers[:, None, :1, None]

    def gathered(self, name, index):
        rows = torch.arange(self.data["query"].shape[0])[:, None, None, None]
        places = self.run(index).long() + torch.zeros(1, 1, 1, 1, dtype=torch.long)
        return self._numbers(name)[rows, places.clamp(0, self.keys - 1)]

    def _numbers(self, name):
        data = self.data
        if name == "documents":
            return data["flags"].logical_not().cumsum(-1)
        if name == "sums":
            return data["ids"].cumsum(-1)
        if name == "packed":
            positions = data["positions"]
            return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        return data[name].long()

    def plus(self, left, right):
        return self.run(left) + self.run(right)

    def minus(self, left, right):
        return self.run(left) - self.run(right)

    def quotient(self, number, divisor):
        return self.run(number) // divisor

    def remainder(self, number, divisor):
        return self.run(number) % divisor

    def as_float(self, number):
        return self.run(number).float()

    def larger(self, left, right):
        return torch.maximum(self.run(left).long(), self.run(right).long())

    # Formulas.
    def compare(self, symbol, left, right):
        return getattr(torch, symbol)(self.run(left), self.run(right))

    def triangle(self, kind, diagonal):
        return getattr(torch.ones(self.queries, self.keys, dtype=torch.bool), kind)(diagonal)

    def valid(self, spelling):
        padding = self.data["padding"]
        spelled = {
            "bool": padding.bool(),
            "!= 0": padding != 0,
            "> 0": padding > 0,
            "== 1": padding == 1,
            "float": padding.float().bool(),
            "half": (1.0 - padding.half()) == 0,
            "flags": self.data["flags"],
        }[spelling]
        return spelled[:, None, None, :]

    def valid_query(self):
        flags = self.data["flags"]
        return flags[:, None, : self.queries, None] if self.queries <= self.keys else flags[:, None, :1, None]

    def shorter(self):
        return torch.nn.functional.pad(self.data["flags"][:, : self.keys - 2], (0, 2))[:, None, None, :]

    def from_outside(self):
        return self.data["square"]

    def of_head(self):
        return self.data["head"][:, None, None]

    def both(self, left, right):
        return self.run(left) & self.run(right)

    def either(self, left, right):
        return self.run(left) | self.run(right)

    def differ(self, left, right):
        return self.run(left) ^ self.run(right)

    def negate(self, operand):
        return ~self.run(operand)

    def choose(self, condition, then, otherwise):
        return torch.where(self.run(condition), self.run(then), self.run(otherwise))

    def there_and_back(self, operand):
        return (self.run(operand).to(torch.float32) * 2 - 1).relu().to(torch.int64) == 1

    def product(self, left, right):
        return (self.run(left).long() * self.run(right).long()).bool()

    def turned(self, operand):
        return self.run(operand).transpose(-1, -2).contiguous().mT

    def filled(self, operand, condition):
        whole = self.run(operand).expand(self.data["query"].shape[0], HEADS, self.queries, self.keys).clone()
        return whole.masked_fill_(self.run(condition), False)

    def row_set(self, operand, row):
        whole = self.run(operand).expand(self.data["query"].shape[0], HEADS, self.queries, self.keys).clone()
        whole[:, :, :, row] = True
        return whole

    # Masks.
    def additive(self, operand, low):
        return torch.where(self.run(operand), 0.0, low)

    def sum_of_masks(self, left, right):
        return self.additive(left, NEG) + torch.zeros(()).masked_fill(~self.run(right), -1e9)

    def one_minus(self, operand):
        return (1.0 - self.run(operand).float()) * torch.finfo(torch.float32).min


def _numbers():
    leaves = st.one_of(
        st.just(("query",)),
        st.just(("key",)),
        st.tuples(st.just("constant"), st.integers(-3, 3)),
        st.sampled_from([("offset",), ("length",)]),
        st.tuples(
            st.sampled_from(["of_key", "of_query"]),
            st.sampled_from(["documents", "sums", "packed", "ids", "positions", "padding"]),
        ),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(["plus", "minus", "larger"]), inner, inner),
            st.tuples(st.sampled_from(["quotient", "remainder"]), inner, st.integers(1, 4)),
            st.tuples(st.just("as_float"), inner),
            st.tuples(st.just("gathered"), st.sampled_from(["documents", "ids", "positions"]), inner),
        ),
        max_leaves=4,
    )


SYMBOLS = ["le", "lt", "ge", "gt", "eq", "ne"]
CAUSAL = ("compare", "le", ("key",), ("query",))


def _near():
    """Comparisons of the kinds that masks are made of."""
    shift = st.tuples(st.just("constant"), st.integers(-4, 4)) | st.just(("offset",))
    shifted = st.tuples(st.sampled_from(["plus", "minus"]), st.just(("query",)), shift)
    document = st.sampled_from(["documents", "sums", "packed", "ids"]).map(
        lambda name: ("compare", "eq", ("of_query", name), ("of_key", name))
    )
    position = st.sampled_from(["le", "ge"]).map(
        lambda symbol: ("compare", symbol, ("of_key", "positions"), ("of_query", "positions"))
    )
    chunk = st.integers(2, 4).map(lambda n: ("compare", "eq", ("quotient", ("query",), n), ("quotient", ("key",), n)))
    limit = st.tuples(st.just("compare"), st.sampled_from(SYMBOLS), st.just(("key",)), shifted)
    return st.one_of(limit, document, position, chunk)


def _formulas():
    leaves = st.one_of(
        st.just(CAUSAL),
        _near(),
        st.tuples(st.just("compare"), st.sampled_from(SYMBOLS), _numbers(), _numbers()),
        st.tuples(st.just("triangle"), st.sampled_from(["tril", "triu"]), st.integers(-3, 2)),
        st.tuples(st.just("valid"), st.sampled_from(["bool", "!= 0", "> 0", "== 1", "float", "half", "flags"])),
        st.sampled_from([("valid_query",), ("shorter",), ("from_outside",), ("of_head",)]),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(["both", "both", "either", "differ", "product"]), inner, inner),
            st.tuples(st.sampled_from(["negate", "there_and_back", "turned"]), inner),
            st.tuples(st.just("choose"), inner, inner, inner),
            st.tuples(st.just("filled"), inner, inner),
            st.tuples(st.just("row_set"), inner, st.integers(0, 3)),
        ),
        max_leaves=6,
    )


def _conjoined(parts):
    return functools.reduce(lambda left, right: ("both", left, right), parts, CAUSAL)


def programs():
    """Mask programs; most are causal and something else, so that many are accepted."""
    formula = _formulas() | st.lists(_near() | _formulas(), max_size=3).map(_conjoined)
    return st.one_of(
        formula,
        st.tuples(st.just("additive"), formula, st.sampled_from([NEG, -1e9, -3.4e38])),
        st.tuples(st.just("sum_of_masks"), formula, formula),
        st.tuples(st.just("one_minus"), formula),
    )


def attend(tree, *inputs):
    mask = Program(inputs).run(tree)
    shape = (*inputs[0].shape[:3], inputs[1].shape[2])
    return scaled_dot_product_attention(inputs[0], inputs[1], inputs[1], mask.expand(shape))


def check_program(oracle, tree, equal_lengths, symbolic):
    """Proves a program's mask and, where it is proved, compares with its values."""
    shape = (2, 5, 5) if equal_lengths else (2, 4, 6)
    inputs = make_inputs(*shape, seed=0)
    trace = make_fx(functools.partial(attend, tree), tracing_mode="symbolic" if symbolic else "fake", pre_dispatch=True)
    graph = trace(*inputs)
    (site,) = oracle.sites(graph)
    result = oracle.prove(graph, site)
    if isinstance(result, Rejection):
        event(f"declined: {result.reason.name}")
        assert result.nodes
        return False
    event("proved")
    others = [(3, 7, 7), (1, 2, 2), (2, 3, 3)] if equal_lengths else [(3, 3, 9), (1, 7, 4), (2, 2, 5)]
    for seed, sizes in enumerate([shape, shape, *(others if symbolic else [])]):
        given_inputs = make_inputs(*sizes, seed=seed)
        placeholders = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        if symbolic and not graph.shape_env.evaluate_guards_for_args(placeholders, given_inputs):
            continue
        result.check(given_inputs)
    return True


# Explaining a failure takes hundreds of further runs.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
COMMON = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=PHASES)


@settings(COMMON, max_examples=80)
@given(programs(), st.booleans(), st.booleans())
@example(_conjoined([("compare", "eq", ("of_query", "packed"), ("of_key", "packed"))]), True, True)
@example(_conjoined([("valid_query",), ("valid", "half")]), True, True)
@example(("compare", "le", ("key",), ("of_query", "positions")), True, True)
@example(("compare", "le", ("key",), ("plus", ("query",), ("offset",))), False, True)
def test_accepted_programs_are_their_interval(oracle_factory, tree, equal_lengths, symbolic):
    check_program(oracle_factory(), tree, equal_lengths, symbolic)


@pytest.mark.slow
@settings(COMMON, max_examples=5000, derandomize=False)
@given(programs(), st.booleans(), st.booleans())
def test_accepted_programs_are_their_interval_in_many_more_cases(oracle_factory, tree, equal_lengths, symbolic):
    check_program(oracle_factory(), tree, equal_lengths, symbolic)
