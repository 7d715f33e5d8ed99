"""What a kernel may be off by: its formula in float64, and beside each number a bound of its rounding errors.

The model is that of Higham, Accuracy and Stability of Numerical Algorithms (2nd edition). An operation in float32
gives (a op b)(1 + d) with |d| <= u = 2^-24 (section 2.2); errors of what goes in are carried on. A sum of n terms is
off by gamma(n - 1) * sum |x| at most, a product of rows of n by gamma(n) * sum |x| |w|, gamma(n) = n u / (1 - n u), in
every order, with and without fused multiply-adds (sections 3.1 and 4.2). So a bound holds on every CPU and card and
for every tile, and no other run is needed to know it. Bounds hold for each number, not for the largest.

Where a number leaves in half precision it is rounded once more: u = 2^-11 in float16, 2^-8 in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lightrm.kernels.operands import CURVES, Activation, ScoreRule

U = 2.0**-24
TINY = 2.0**-125  # where subnormal numbers are flushed to zero, and where the exponential functions end
EXP = 8  # units in the last place that an exponential function is off by, beside the rounding of its argument
LEAST_BLOCK = 16  # keys that attention takes at a time, at least
FACTORS = {torch.float32: 1.001, torch.float16: 1.01, torch.bfloat16: 1.01}  # of a wrong column that must be seen


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


@dataclass(frozen=True, slots=True)
class Bounded:
    """exact: float64; off: how far from it a float32 computation may end, float64 of the same shape."""

    exact: torch.Tensor
    off: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> Bounded:
        """A number as it is given."""
        return cls(x.double(), torch.zeros_like(x, dtype=torch.float64))

    @property
    def most(self) -> torch.Tensor:
        return self.exact.abs() + self.off

    def rounded(self, dtype: torch.dtype = torch.float32, cut: bool = False) -> Bounded:
        """To the nearest number of a dtype; cut: towards zero, as Triton's interpreter makes bfloat16."""
        unit = torch.finfo(dtype).eps * (1.0 if cut else 0.5)
        least = TINY if dtype != torch.float16 else 2.0**-25
        return Bounded(self.exact, self.off + unit * self.most + least)

    def __add__(self, other: Bounded) -> Bounded:
        return Bounded(self.exact + other.exact, self.off + other.off).rounded()

    def __neg__(self) -> Bounded:
        return Bounded(-self.exact, self.off)

    def __sub__(self, other: Bounded) -> Bounded:
        return self + -other

    def __mul__(self, other: Bounded) -> Bounded:
        off = self.exact.abs() * other.off + self.off * other.most
        return Bounded(self.exact * other.exact, off).rounded()

    def __truediv__(self, other: Bounded) -> Bounded:
        least = other.exact.abs() - other.off
        off = (self.exact.abs() * other.off + other.exact.abs() * self.off) / (other.exact.abs() * least)
        return Bounded(self.exact / other.exact, off).rounded()

    def __getitem__(self, at: object) -> Bounded:
        return self.each(lambda x: x[at])  # type: ignore[index]

    def each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Bounded:
        """Numbers in other places."""
        return Bounded(move(self.exact), move(self.off))

    def total(self, dim: int = -1) -> Bounded:
        """A sum, in any order."""
        n, keep = self.exact.shape[dim], partial(torch.sum, dim=dim, keepdim=True)
        return Bounded(keep(self.exact), keep(self.off) + gamma(max(n - 1, 0)) * keep(self.most))

    def product(self, other: Bounded, more: int = 0) -> Bounded:
        """Matrices, summed in any order; more: roundings of each term or of the whole beside those of the sum."""
        off = self.off @ other.most + self.exact.abs() @ other.off
        n = self.exact.shape[-1] + more
        return Bounded(self.exact @ other.exact, off + gamma(n) * (self.most @ other.most) + TINY)

    def peak(self) -> Bounded:
        """The largest magnitude of a row, (..., 1); not 0, for it is a divisor."""
        return self.each(lambda x: x.abs().amax(-1, keepdim=True).clamp(min=1e-30))

    def root(self) -> Bounded:
        """Of what is not negative."""
        root = self.exact.sqrt()
        return Bounded(root, self.off / root.clamp(min=1e-300)).rounded()

    def silu(self) -> Bounded:
        """x / (1 + exp(-x)). No slope of it is above 1.1. The argument of the exponential, rounded, is off by u |x|
        twice, which matters to the result as far as the exponential is not small beside 1."""
        share = torch.sigmoid(-self.exact)
        own = U * (EXP + 4 + 2 * self.exact.abs() * share)
        exact = torch.nn.functional.silu(self.exact)
        return Bounded(exact, 1.1 * self.off + own * (exact.abs() + 1.1 * self.off) + TINY * (1 + self.exact.abs()))

    def gelu_tanh(self) -> Bounded:
        """x * sigmoid(z), z = factor (x + cubic x^3); no slope of it is above 1.2. z has four roundings, and matters as
        in `silu`."""
        factor, cubic = CURVES["gelu_tanh"]
        z = factor * (self.exact + cubic * self.exact**3)
        share = torch.sigmoid(-z)
        own = U * (EXP + 4 + 6 * z.abs() * share)
        exact = self.exact * torch.sigmoid(z)
        return Bounded(exact, 1.2 * self.off + own * (exact.abs() + 1.2 * self.off) + TINY * (1 + self.exact.abs()))

    def capped(self, cap: float) -> Bounded:
        """cap * tanh(x / cap). No slope of it is above 1. Near 0 a quotient of polynomials of few terms; elsewhere 1 -
        2 / (e^2x + 1), where e^2x is above 2 and the difference above 0.4."""
        exact = cap * torch.tanh(self.exact / cap)
        return Bounded(exact, self.off + U * (2 * EXP + 16) * exact.abs() + TINY).rounded()


def norm(x: Bounded, eps: float) -> Bounded:
    """x / sqrt(mean(x^2) + eps)."""
    return x * shrink(x, eps)


def shrink(x: Bounded, eps: float) -> Bounded:
    one, count = torch.ones(1, 1).to(x.exact), torch.full((1, 1), float(x.exact.shape[-1])).to(x.exact)
    mean = (x * x).total() / Bounded.of(count)
    return Bounded.of(one) / (mean + Bounded.of(one * eps).rounded()).root()


def gated(gate_up: Bounded, activation: Activation = "silu") -> Bounded:
    gate, up = (gate_up.each(lambda x, k=k: x.chunk(2, -1)[k]) for k in range(2))
    return (gate.silu() if activation == "silu" else gate.gelu_tanh()) * up


def turned(x: Bounded, cos: torch.Tensor, sin: torch.Tensor) -> Bounded:
    """RoPE, half-split: x (T, heads, E), cos and sin (T, n); the channels from 2 n on stay."""
    half = cos.shape[-1]
    a, b, c, s = x[..., :half], x[..., half : 2 * half], Bounded.of(cos[:, None]), Bounded.of(sin[:, None])
    parts = a * c - b * s, b * c + a * s, x[..., 2 * half :]
    return Bounded(torch.cat([part.exact for part in parts], -1), torch.cat([part.off for part in parts], -1))


def scaled(acc: torch.Tensor, row_scale_T: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None) -> Bounded:
    """acc * (row scale * scale) + bias; a large integer is rounded once as it becomes a float."""
    y = Bounded.of(acc).rounded() * (Bounded.of(row_scale_T[:, None]) * Bounded.of(scale_O))
    return y if bias_O is None else y + Bounded.of(bias_O)


def spread(x: Bounded, matrix: torch.Tensor) -> Bounded:
    """A block Hadamard transform as a matrix whose terms are 0 and +-1/sqrt(block): as many terms as a block has, and
    the scale."""
    terms = int((matrix != 0).sum(0).max())
    magnitude = matrix.abs().double()
    return Bounded(x.exact @ matrix.double(), x.off @ magnitude + gamma(terms + 3) * (x.most @ magnitude) + TINY)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    place: torch.Tensor,
    rule: ScoreRule,
    bias_dtype: torch.dtype = torch.float32,
    cut: bool = False,
) -> Bounded:
    """softmax(cap(scale * q k) + slope * distance) v, (T, H, E); seen (T, T): which keys count, if the window reaches
    them; place (T,): positions.

    Kept on the way is any maximum at all, for it falls out of the quotient. Of online softmax, a weight is a product of
    exponentials over blocks of keys: their arguments add up to the difference of score and maximum, each brings its
    own error, and so many roundings more. A weight may be rounded to the dtype of v. bias_dtype: of slope * distance.
    """
    heads, keys = q.shape[1], len(k)
    blocks = -(-keys // LEAST_BLOCK) + 1
    key, value = (Bounded.of(x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)) for x in (k, v))
    query = Bounded(q.double().transpose(0, 1) * rule.scale, torch.zeros_like(q.transpose(0, 1), dtype=torch.float64))
    score = query.product(key.each(lambda x: x.transpose(1, 2)), more=4)  # the scale, its own rounding, and the bias
    if rule.softcap is not None:
        score = score.capped(rule.softcap)
    if rule.slopes_H is not None:
        ahead = Bounded.of((place[None, :] - place[:, None])[None])
        score = score + (Bounded.of(rule.slopes_H[:, None, None]) * ahead).rounded(bias_dtype)
    if rule.window is not None:
        seen = seen & (place[:, None] - place[None, :] < rule.window)
    below = score.exact.masked_fill(~seen, float("-inf"))
    if len(q):
        below = below - below.amax(-1, keepdim=True)
    distance = below.abs().masked_fill(~seen, 0)
    own = U * (3 * distance + (EXP + 1) * blocks)
    weight = below.exp()
    weights = Bounded(weight, weight * torch.expm1(score.off.masked_fill(~seen, 0) * (1 + U) + own) + TINY)
    mixed = weights.rounded(q.dtype, cut).product(value, more=blocks + 1)
    total = weights.total()
    out = mixed / Bounded(total.exact, total.off + gamma(blocks) * total.most)
    return out.each(lambda x: x.transpose(0, 1))


def excess(found: torch.Tensor, bound: Bounded, cut: bool = False) -> torch.Tensor:
    """How often its bound each number is off, rounding to its own dtype included; above 1 it is wrong."""
    limit = bound.rounded(found.dtype, cut)
    ratio = (found.double() - limit.exact).abs() / limit.off
    return ratio.nan_to_num(nan=torch.inf, posinf=torch.inf)


def within(found: torch.Tensor, bound: Bounded, cut: bool = False) -> bool:
    return found.shape == bound.exact.shape and bool((excess(found, bound, cut) <= 1).all())


def blind(found: torch.Tensor, bound: Bounded, factor: float | None = None, cut: bool = False) -> float:
    """The share of columns in which a factor would not be seen, of those that hold anything: a bound's worth."""
    wrong = (found.double() * (factor or FACTORS[found.dtype])).to(found.dtype)
    seen = (excess(wrong, bound, cut) > 1).flatten(0, -2).any(0)
    held = (bound.exact.abs() > 1e-20).flatten(0, -2).any(0)
    return float((held & ~seen).sum() / held.sum().clamp(min=1))


def off_rows(values: torch.Tensor, scale_T: torch.Tensor, bound: Bounded) -> torch.Tensor:
    """Of int8 rows with a scale each, how far a value is from x / scale, in units of what it may be: half a step, which
    is the rounding to whole numbers, and what x may be off by. 127 / peak and its product with x round thrice."""
    steps = bound.exact / scale_T.double()[:, None]
    allowed = 0.5 + bound.off / scale_T.double()[:, None] + 127 * gamma(6)
    return ((values.double() - steps).abs() / allowed).nan_to_num(nan=torch.inf)


def scale_of(bound: Bounded) -> Bounded:
    """The scale of an int8 row: its largest magnitude over 127."""
    return (bound.peak() / Bounded.of(torch.full_like(bound.exact[..., :1], 127.0)))[..., 0]
