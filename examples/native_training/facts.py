"""A retrieval task inside ordinary text: a fact is stated, and later its statement has to be completed."""

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Digits of a key; the tokenizer gives each a token of its own.
DIGITS = 5
# Tokens of text between a fact's two statements, at least.
NEAREST = 64

Encode = Callable[[str], list[int]]


def draw_fact(encode: Encode, draw: random.Random) -> tuple[list[int], list[int]]:
    """Draws a fact.

    Args:
        encode: from a text to its tokens.
        draw: source of randomness.

    Returns:
        The tokens of its statement: those up to the key, and those of the key and the line's end.
    """
    name = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=3))
    key = "".join(draw.choices("0123456789", k=DIGITS))
    return encode(f"\n# the key of {name} is "), encode(f"{key}\n")


def plant(text: Tensor, encode: Encode, count: int, draw: random.Random) -> Tensor:
    """States facts in a text, each twice: near and far apart equally often, as text repeats itself.

    The distance between the two is log-uniform, up to the whole text, and the place of the pair uniform.

    Args:
        text: `[T]`.
        encode: from a text to its tokens.
        count: number of facts.
        draw: source of randomness.

    Returns:
        `[T]`: as much of the text as leaves room for the statements.
    """
    facts = [draw_fact(encode, draw) for _ in range(count)]
    statements = [asked + answer for asked, answer in facts]
    room = len(text) - 2 * sum(map(len, statements))
    if room < 0:
        raise ValueError(f"{len(text)} tokens have no room for {count} facts; give longer texts or fewer facts.")
    places = []
    for statement in statements:
        distance = min(room, round(math.exp(draw.uniform(math.log(NEAREST), math.log(max(NEAREST, room))))))
        first = draw.randrange(room - distance + 1)
        places += [(first, statement), (first + distance, statement)]
    parts, position = [], 0
    for place, statement in sorted(places):
        parts += [text[position:place], torch.tensor(statement)]
        position = place
    return torch.cat([*parts, text[position:room]])


def question(text: Tensor, encode: Encode, depth: float, length: int, draw: random.Random) -> tuple[Tensor, int]:
    """States one fact in a text, and asks for it at the end.

    Args:
        text: `[T]`.
        encode: from a text to its tokens.
        depth: where the fact stands, from 0 (the start of the context) to 1 (its end).
        length: of the context, tokens; at most T.
        draw: source of randomness.

    Returns:
        `[T]`, whose tokens after `length` are padding without meaning, and the position of the key's first token.
    """
    asked, answer = draw_fact(encode, draw)
    room = length - 2 * len(asked) - 2 * len(answer)
    if room < 0:
        raise ValueError(f"a context of {length} tokens has no room for a fact and its question.")
    place = round(depth * room)
    statement = torch.tensor(asked + answer)
    filled = torch.cat([text[:place], statement, text[place:room], statement])
    return torch.cat([filled, text[: len(text) - length]]), length - len(answer)


@torch.no_grad()
def retrieval_rates(
    predict: Callable[[Tensor], Tensor],
    text: Tensor,
    encode: Encode,
    *,
    tokens: int,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    batch: int,
) -> list[list[float]]:
    """Measures how often a key is completed without a mistake.

    Args:
        predict: from tokens `[B, T]` to the likeliest next token at each position `[B, T]`.
        text: `[N]`, N ≥ `tokens`: what the facts are hidden in.
        encode: from a text to its tokens.
        tokens: T of every call.
        lengths: of the contexts, tokens.
        depths: of the facts, from 0 to 1.
        samples: questions for each length and depth.
        batch: B of every call.

    Returns:
        For each length the rates at all depths, from 0 to 1.
    """
    draw = random.Random(0)
    cells = [(length, depth) for length in lengths for depth in depths for _ in range(samples)]
    asked = []
    for length, depth in cells:
        start = draw.randrange(len(text) - tokens + 1)
        asked.append(question(text[start : start + tokens], encode, depth, length, draw))
    right: list[bool] = []
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        part += [part[-1]] * (batch - len(part))
        questions = torch.stack([tokens_of for tokens_of, _ in part])
        predicted = predict(questions).to(questions.device)
        for row, (wanted, position) in enumerate(part):
            key = slice(position, position + DIGITS)
            found = predicted[row, key.start - 1 : key.stop - 1]
            right.append(torch.equal(found, wanted[key]))
    rates = torch.tensor(right[: len(cells)]).float().unflatten(0, (len(lengths), len(depths), samples)).mean(-1)
    return rates.tolist()
