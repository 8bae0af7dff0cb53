"""Sentences of word ids from a small grammar, padded, and an encoder with an attention mask that names their slots.

What a number, a name or a city means depends on words before and behind it, with other words in between: the time of
"at the early 7 pm", the deadline of "by 7 pm", the recipient of "send ... to my old Ana", the artist of "play ... Ana".
One word in twenty is unknown, so some slots can only be guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

LENGTH, UNKNOWN = 32, 0.05
VERBS = "book call cancel find play remind send".split()
PREPOSITIONS = "about at by for from in on to with".split()
FILLERS = "a big cheap early late my new nice old please quick really small the very".split()
NAMES = "Ana Ben Chris Dana Eli Fay Gus Hana Ivo Jo".split()
CITIES = "Bonn Cairo Delhi Lima Oslo Paris Quito Rome Seoul Turin".split()
NUMBERS = [str(n) for n in range(1, 13)]
UNITS = "am days dollars people pm".split()
DAYS = "Friday Monday Sunday Thursday Tuesday".split()
WORDS = ["[pad]", "[unknown]", *VERBS, *PREPOSITIONS, *FILLERS, *NAMES, *CITIES, *NUMBERS, *UNITS, *DAYS]
ID = {word: number for number, word in enumerate(WORDS)}
SLOTS = (
    "none origin destination place time deadline duration amount count day due sender recipient topic artist".split()
)
NONE = SLOTS.index("none")

_OF_NAME = {"from": "sender", "by": "sender", "to": "recipient", "for": "recipient", "with": "recipient"}
_OF_CITY = {"from": "origin", "to": "destination", "in": "place", "at": "place"}
_OF_UNIT = {"days": "duration", "dollars": "amount", "people": "count"}


class Sentences(NamedTuple):
    """Padded sentences [N, 32]: ids, 1 where a word is and 0 where none is, and slots (-1 where no word is)."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    slots: NDArray[np.int64]


def _phrase(verb: str, draw: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Words with their slots: a preposition, other words, and a name, city, number with unit, or day."""

    def one(words: list[str]) -> str:
        return words[draw.integers(len(words))]

    preposition, kind = one(PREPOSITIONS), one(["name", "city", "number", "day"])
    yield preposition, "none"
    for _ in range(draw.integers(0, 4)):
        yield one(FILLERS), "none"
    if kind == "name":
        yield one(NAMES), "artist" if verb == "play" else _OF_NAME.get(preposition, "topic")
    elif kind == "city":
        swapped = {"from": "to", "to": "from"}.get(preposition, preposition) if verb == "cancel" else preposition
        yield one(CITIES), _OF_CITY.get(swapped, "topic")
    elif kind == "day":
        yield one(DAYS), "due" if preposition == "by" else "day"
    else:
        unit = one(UNITS)
        slot = _OF_UNIT.get(unit) or ("deadline" if preposition == "by" else "time")
        yield one(NUMBERS), slot
        yield unit, slot


def sentences(number: int, draw: np.random.Generator) -> Sentences:
    """Draw sentences: a verb and one to five phrases, cut after 32 words."""
    ids = np.zeros((number, LENGTH), np.int64)
    slots = np.full((number, LENGTH), -1, np.int64)
    for k in range(number):
        verb = VERBS[draw.integers(len(VERBS))]
        words = [(FILLERS[draw.integers(len(FILLERS))], "none")] * int(draw.integers(0, 3)) + [(verb, "none")]
        for _ in range(draw.integers(1, 6)):
            words += _phrase(verb, draw)
        words = words[:LENGTH]
        known = draw.random(len(words)) >= UNKNOWN
        ids[k, : len(words)] = np.where(known, [ID[word] for word, _ in words], ID["[unknown]"])
        slots[k, : len(words)] = [SLOTS.index(slot) for _, slot in words]
    return Sentences(ids, (slots >= 0).astype(np.int64), slots)


class MaskedAttention(nn.Module):
    """Multi-head attention with linear layers of its own for queries, keys and values; padding is masked."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.view(y.shape[0], y.shape[1], self.heads, self.size).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        weights = (query @ key.transpose(-1, -2) / self.size**0.5 + bias).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a feed-forward, each with a shortcut and a LayerNorm behind it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.norm1 = MaskedAttention(width, heads), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, bias))
        return self.norm2(x + self.feed_forward(x))


class Tagger(nn.Module):
    """Ids and mask [N, length] -> scores [N, length, 15] of the slots."""

    def __init__(self, width: int = 40, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(len(WORDS), width), nn.Embedding(LENGTH, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width, heads, 2 * width) for _ in range(depth))
        self.classifier = nn.Linear(width, len(SLOTS))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        bias = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        x = self.norm(self.words(ids) + self.positions(torch.arange(ids.shape[1])))
        for layer in self.layers:
            x = layer(x, bias)
        return self.classifier(x)


def loss(model: Tagger, batch: Sentences) -> Tensor:
    """Cross-entropy of the slots of all words."""
    scores = model(torch.from_numpy(batch.ids), torch.from_numpy(batch.mask))
    return nn.functional.cross_entropy(scores.flatten(0, 1), torch.from_numpy(batch.slots).flatten(), ignore_index=-1)
