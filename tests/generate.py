"""Random valid graphs from a seed: convolutions, residuals, gates, shuffles, attention, feed-forward, wired at will."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from build import Net

OPSETS = (9, 11, 13, 17, 18, 21)
EXTENT, SEQUENCE = 6, 5


@dataclass
class Map:
    """A tensor [N, channels, EXTENT, EXTENT]."""

    name: str
    channels: int


class Generator:
    """Grows one graph; every choice comes from ``rng``."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng([seed, 77])
        self.net = Net(int(self.rng.choice(OPSETS)), seed=seed)
        self.pool: list[Map] = []

    def pick(self) -> Map:
        """A tensor of the pool, recent ones more often."""
        weights = np.arange(1, len(self.pool) + 1) ** 2
        return self.pool[int(self.rng.choice(len(self.pool), p=weights / weights.sum()))]

    def width(self, multiple: int = 1) -> int:
        """A number of channels."""
        return int(self.rng.integers(max(1, 4 // multiple), max(2, 12 // multiple))) * multiple

    def add(self, name: str, channels: int) -> None:
        """A new tensor, behind a random activation."""
        kind = self.rng.choice(["Relu", "Tanh", "Sigmoid", "LeakyRelu", ""])
        self.pool.append(Map(self.net.op(str(kind), name) if kind else name, channels))

    # -- blocks on maps --------------------------------------------------------------------------------------------

    def convolve(self) -> None:
        x, outs = self.pick(), self.width()
        y = self.net.conv(x.name, x.channels, outs, int(self.rng.choice([1, 3])), bias=bool(self.rng.integers(2)))
        self.add(self.net.norm(y, outs) if self.rng.integers(2) else y, outs)

    def group(self) -> None:
        """A grouped or depthwise convolution."""
        x = self.pick()
        divisors = [g for g in range(1, x.channels + 1) if x.channels % g == 0]
        group = int(self.rng.choice(divisors))
        outs = group * int(self.rng.integers(1, 4))
        self.add(self.net.conv(x.name, x.channels, outs, 3, group=group), outs)

    def meet(self) -> None:
        """Two tensors of one width, or one projected to the other's, elementwise."""
        a, b = self.pick(), self.pick()
        other = b.name if a.channels == b.channels else self.net.conv(b.name, b.channels, a.channels, 1)
        self.add(self.net.op(str(self.rng.choice(["Add", "Mul", "Sub", "Max"])), a.name, other), a.channels)

    def join(self) -> None:
        parts = [self.pick() for _ in range(int(self.rng.integers(2, 4)))]
        channels = sum(p.channels for p in parts)
        if channels <= 40:
            self.add(self.net.op("Concat", *(p.name for p in parts), axis=1), channels)

    def part(self) -> None:
        """Split in two, or a Slice."""
        x = self.pick()
        if x.channels < 2:
            return
        at = int(self.rng.integers(1, x.channels))
        if self.rng.integers(2):
            left, right = self.net.split(x.name, [at, x.channels - at], 1)
            self.pool += [Map(left, at), Map(right, x.channels - at)]
        else:
            self.add(self.net.slice(x.name, 0, at, 1), at)

    def gate(self) -> None:
        """Squeeze and excite."""
        x, inner = self.pick(), self.width()
        pooled = self.net.op("GlobalAveragePool", x.name)
        code = self.net.op("Relu", self.net.conv(pooled, x.channels, inner, 1))
        scale = self.net.op("Sigmoid", self.net.conv(code, inner, x.channels, 1))
        self.add(self.net.op("Mul", x.name, scale), x.channels)

    def shuffle(self) -> None:
        x = self.pick()
        divisors = [g for g in range(2, x.channels) if x.channels % g == 0]
        if divisors:
            g = int(self.rng.choice(divisors))
            y = self.net.reshape(x.name, 0, g, x.channels // g, EXTENT, EXTENT)
            y = self.net.transpose(y, 0, 2, 1, 3, 4)
            self.add(self.net.reshape(y, 0, x.channels, EXTENT, EXTENT), x.channels)

    def scale(self) -> None:
        """A constant per channel, position, or of the whole shape."""
        x = self.pick()
        shapes = [(x.channels, 1, 1), (1, x.channels, 1, 1), (1,), (EXTENT, EXTENT), (x.channels, EXTENT, EXTENT)]
        constant = self.net.weight(*shapes[int(self.rng.integers(len(shapes)))], scale=0.7)
        self.add(self.net.op(str(self.rng.choice(["Add", "Mul"])), x.name, constant), x.channels)

    def pool_positions(self) -> None:
        x = self.pick()
        kind = str(self.rng.choice(["MaxPool", "AveragePool"]))
        self.add(self.net.op(kind, x.name, kernel_shape=[3, 3], pads=[1, 1, 1, 1]), x.channels)

    def normalise(self) -> None:
        """Over positions, over channels, or a sum over channels spread again."""
        x, how = self.pick(), int(self.rng.integers(3))
        if how == 0:
            vectors = [self.net.weight(x.channels, low=0.5), self.net.weight(x.channels)]
            self.add(self.net.op("InstanceNormalization", x.name, *vectors), x.channels)
        elif how == 1:
            self.add(self.net.op("Sub", x.name, self.net.reduce("ReduceMean", x.name, [1])), x.channels)
        else:
            total = self.net.op("Tanh", self.net.reduce("ReduceSum", x.name, [1]))
            self.add(self.net.op("Mul", x.name, total), x.channels)

    def permute(self) -> None:
        """Channels picked, reversed, repeated or padded."""
        x, how = self.pick(), int(self.rng.integers(3))
        if how == 0:
            index = self.rng.integers(0, x.channels, int(self.rng.integers(2, 9)))
            self.add(self.net.gather(x.name, index, 1), len(index))
        elif how == 1:
            self.add(self.net.pad(x.name, [0, 1, 0, 0, 0, 2, 0, 0]), x.channels + 3)
        elif x.channels <= 12:
            self.add(self.net.op("Tile", x.name, self.net.const([1, 2, 1, 1])), 2 * x.channels)

    def attend(self) -> None:
        """Self-attention over positions of a row, heads on the channels, with a residual around it."""
        net, x = self.net, self.pick()
        heads, width = int(self.rng.integers(1, 4)), int(self.rng.integers(1, 5))
        inner, positions = heads * width, EXTENT * EXTENT
        rows = net.transpose(net.reshape(x.name, 0, x.channels, positions), 0, 2, 1)
        if self.rng.integers(2):
            parts = list(net.split(net.linear(rows, x.channels, 3 * inner), [inner] * 3, 2))
        else:
            parts = [net.linear(rows, x.channels, inner) for _ in range(3)]
        q, k, v = (net.transpose(net.reshape(p, 0, positions, heads, width), 0, 2, 1, 3) for p in parts)
        scores = net.op("Softmax", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), axis=3)
        y = net.reshape(net.transpose(net.op("MatMul", scores, v), 0, 2, 1, 3), 0, positions, inner)
        y = net.op("Add", rows, net.linear(y, inner, x.channels))
        self.add(net.reshape(net.transpose(y, 0, 2, 1), 0, x.channels, EXTENT, EXTENT), x.channels)

    def feed_forward(self) -> None:
        """On channels last, gated half of the time."""
        net, x, inner = self.net, self.pick(), self.width()
        rows = net.transpose(x.name, 0, 2, 3, 1)
        if self.rng.integers(2):
            gate, up = net.split(net.linear(rows, x.channels, 2 * inner), [inner, inner], 3)
            h = net.op("Mul", net.op("Sigmoid", gate), up)
        else:
            h = net.op("Relu", net.linear(rows, x.channels, inner))
        y = net.op("Add", rows, net.linear(h, inner, x.channels))
        self.add(net.transpose(y, 0, 3, 1, 2), x.channels)

    # -- rarer ones ------------------------------------------------------------------------------------------------

    def transposed(self) -> None:
        """ConvTranspose, grouped where it fits."""
        x = self.pick()
        group = int(self.rng.choice([g for g in range(1, x.channels + 1) if x.channels % g == 0]))
        per = int(self.rng.integers(1, 4))
        weight = self.net.weight(x.channels, per, 3, 3, scale=0.3)
        self.add(self.net.op("ConvTranspose", x.name, weight, group=group, pads=[1, 1, 1, 1]), per * group)

    def tie(self) -> None:
        """One square weight used twice, the second time transposed or not."""
        x = self.pick()
        weight = self.net.weight(x.channels, x.channels, scale=x.channels**-0.5)
        rows = self.net.transpose(x.name, 0, 2, 3, 1)
        y = self.net.op("Relu", self.net.op("MatMul", rows, weight))
        other = self.net.transpose(weight, 1, 0) if self.rng.integers(2) else weight
        self.add(self.net.transpose(self.net.op("MatMul", y, other), 0, 3, 1, 2), x.channels)

    def shuffled_groups(self) -> None:
        """Grouped convolution, shuffle, grouped convolution, with a residual at times."""
        net, x, g = self.net, self.pick(), int(self.rng.integers(2, 5))
        width = g * int(self.rng.integers(1, 5))
        wide = net.conv(x.name, x.channels, width, 1)
        y = net.op("Relu", net.conv(wide, width, width, 1, group=g))
        y = net.transpose(net.reshape(y, 0, g, width // g, EXTENT, EXTENT), 0, 2, 1, 3, 4)
        y = net.reshape(y, 0, width, EXTENT, EXTENT)
        y = net.conv(y, width, width, 3, group=int(self.rng.choice([g, width, 1])))
        self.add(net.op("Add", wide, y) if self.rng.integers(2) else y, width)

    def blocks(self) -> None:
        """Blocks of channels to pixels and back."""
        net, x = self.net, self.pick()
        wide = net.conv(x.name, x.channels, 8, 1)
        y = net.op("Tanh", net.op("DepthToSpace", wide, blocksize=2))
        self.add(net.op("SpaceToDepth", y, blocksize=2), 8)

    def stack(self) -> None:
        """Two tensors on a new axis, weighted and summed, or one of them picked."""
        net, x = self.net, self.pick()
        other = net.conv(x.name, x.channels, x.channels, 1)
        both = net.op("Concat", net.unsqueeze(x.name, [1]), net.unsqueeze(other, [1]), axis=1)
        if self.rng.integers(2):
            self.add(net.gather(both, int(self.rng.integers(2)), 1), x.channels)
        else:
            weighed = net.op("Mul", both, net.weight(1, 2, 1, 1, 1, scale=1.0))
            self.add(net.reduce("ReduceSum", weighed, [1], 0), x.channels)

    def choose(self) -> None:
        """Where: of two tensors of one width, or a tensor and a constant."""
        net, x = self.net, self.pick()
        flag = net.op("Greater", x.name, net.const(0.1, net.dtype))
        other = net.conv(x.name, x.channels, x.channels, 1) if self.rng.integers(2) else net.const(-0.5, net.dtype)
        self.add(net.op("Where", flag, x.name, other), x.channels)

    def few_keys(self) -> None:
        """Attention whose key and value heads serve several query heads."""
        net, x = self.net, self.pick()
        shared, times, width = (int(self.rng.integers(1, 4)) for _ in range(3))
        heads, positions = shared * times, EXTENT * EXTENT
        rows = net.transpose(net.reshape(x.name, 0, x.channels, positions), 0, 2, 1)
        q = net.linear(rows, x.channels, heads * width)
        q = net.transpose(net.reshape(q, 0, positions, heads, width), 0, 2, 1, 3)
        pair = []
        for _ in range(2):
            y = net.linear(rows, x.channels, shared * width)
            y = net.unsqueeze(net.transpose(net.reshape(y, 0, positions, shared, width), 0, 2, 1, 3), [2])
            y = net.op("Expand", y, net.const([1, 1, times, 1, 1]))
            pair.append(net.reshape(y, 0, heads, positions, width))
        scores = net.op("Softmax", net.op("MatMul", q, net.transpose(pair[0], 0, 1, 3, 2)), axis=3)
        y = net.reshape(net.transpose(net.op("MatMul", scores, pair[1]), 0, 2, 1, 3), 0, positions, heads * width)
        y = net.linear(y, heads * width, x.channels)
        self.add(net.reshape(net.transpose(y, 0, 2, 1), 0, x.channels, EXTENT, EXTENT), x.channels)

    # -- the whole -------------------------------------------------------------------------------------------------

    def finish(self) -> onnx.ModelProto:
        """One to three outputs: a map, a pooled classifier, or everything flattened."""
        outputs = []
        for x in self.pool[-int(self.rng.integers(1, 4)) :]:
            how = int(self.rng.integers(4))
            if how == 0:
                outputs.append(self.net.conv(x.name, x.channels, 2, 1))
            elif how == 1:
                pooled = self.net.op("Flatten", self.net.op("GlobalAveragePool", x.name), axis=1)
                outputs.append(self.net.linear(pooled, x.channels, 3, gemm=True))
            elif how == 2:
                flat = self.net.op("Flatten", x.name, axis=1)
                outputs.append(self.net.linear(flat, x.channels * EXTENT * EXTENT, 3, gemm=True))
            else:
                outputs.append(self.net.op("Identity", x.name))
        return self.net.model(*outputs)


def generate(seed: int, *, rare: bool = False) -> onnx.ModelProto:
    """A random model of 10 to 100 nodes; ``rare``: of the rarer blocks too."""
    made = Generator(seed)
    x = made.net.input("x", ["N", 3, EXTENT, EXTENT])
    made.pool.append(Map(made.net.conv(x, 3, made.width(2)), 0))
    made.pool[0].channels = int(next(t.dims[0] for t in made.net.initializers if len(t.dims) == 4))
    blocks: list[Callable[[], None]] = [
        made.convolve, made.convolve, made.group, made.meet, made.meet, made.join, made.part, made.gate, made.shuffle,
        made.scale, made.pool_positions, made.normalise, made.permute, made.attend, made.feed_forward,
    ]  # fmt: skip
    if rare:
        blocks += [
            made.transposed, made.tie, made.shuffled_groups, made.shuffled_groups, made.blocks, made.stack, made.choose,
            made.few_keys,
        ]  # fmt: skip
    for _ in range(int(made.rng.integers(4, 11))):
        blocks[int(made.rng.integers(len(blocks)))]()
    return made.finish()
