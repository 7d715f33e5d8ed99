"""Files of compressed-tensors, as llm-compressor writes them and vLLM runs them.

For each quantized linear layer X of O x I:

    packed   X.weight_packed      int32 (O, I * bits / 32)   q + 2^(bits - 1), lowest bits first, along I
             X.weight_zero_point  int32 (O * bits / 32, G)   zero points, offset alike, along O; if asymmetric. Older
                                  int8 (O, G)                releases store them as they are
             X.weight_shape       int64 (2,)                 O and I
             X.weight_g_idx       int32 (I,)                 group of each input under activation order, or -1 for all
    naive    X.weight             int8 or float8_e4m3fn (O, I)
             X.weight_zero_point  int8, on the grid of the scales; if asymmetric
    both     X.weight_scale       float: (1,), (O, 1), (O, G), or a block each
             X.input_scale, X.input_zero_point               of rounded activations, which lightrm rounds by itself

    weight[o, i] = weight_scale * (q[o, i] - zero_point)      rounded to the dtype of weight_scale, as the library does

Packed values are `schemes.grouped` (w4a16 keeps them). int8 by channel, symmetric, under int8 activations is
`schemes.int8` (w8a8 keeps them). All others are `schemes.scaled`, which is widened.
"""

from __future__ import annotations

import torch

from lightrm.checkpoints.compressed_terms import CompressedTerms, Group
from lightrm.checkpoints.source import PackedSource, Quantized, TensorSource
from lightrm.errors import TensorMismatchError
from lightrm.schemes.grouped import WORD, Grouped, unpack
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.scaled import Scaled

PACKED, WEIGHT, SCALE = ".weight_packed", ".weight", ".weight_scale"
ZERO, SHAPE, INDEX = ".weight_zero_point", ".weight_shape", ".weight_g_idx"
BESIDE = (SCALE, ZERO, SHAPE, INDEX, PACKED, ".input_scale", ".input_zero_point")
NAIVE = {torch.int8: "int", torch.float8_e4m3fn: "float"}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class CompressedSource(PackedSource):
    """A source in which each quantized layer X appears as one `X.weight`."""

    def __init__(self, stored: TensorSource, terms: CompressedTerms) -> None:
        super().__init__(stored)
        self.terms = terms
        self.layers: dict[str, tuple[Group, tuple[int, int]]] = {}
        for name in stored.names:
            if name.endswith((PACKED, SCALE)):
                self.add(name.removesuffix(PACKED).removesuffix(SCALE))
            elif name.endswith(WEIGHT) and stored.dtype(name) in NAIVE:
                self.add(name.removesuffix(WEIGHT))
        self.holds = terms.holds

    def add(self, stem: str) -> None:
        """Find out how a layer is quantized, and show its weight alone. Raises TensorMismatchError."""
        if stem in self.layers:
            return
        packed, names = stem + PACKED in self.stored.names, self.stored.names
        mark = stem + (PACKED if packed else WEIGHT)
        absent = [name for name in (mark, stem + SCALE) if name not in names]
        if absent:
            raise TensorMismatchError(f"compressed-tensors layer {stem!r} lacks {', '.join(absent)}")
        shape = self.whole_shape(stem) if packed else self.matrix(mark)
        self.layers[stem] = self.group(stem, shape, packed), shape
        for part in BESIDE:
            self.names.pop(stem + part, None)
        self.names[stem + WEIGHT] = names[mark]

    def matrix(self, name: str) -> tuple[int, int]:
        shape = self.stored.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise TensorMismatchError(f"{self.stored.names[name]}: {name!r} has the shape {shape}, expected a matrix")
        return shape[0], shape[1]

    def whole_shape(self, stem: str) -> tuple[int, int]:
        """Return O and I of a packed layer, from weight_shape."""
        name = stem + SHAPE
        if name not in self.stored.names:
            raise TensorMismatchError(f"compressed-tensors layer {stem!r} lacks {name}")
        found = self.stored.read(name)
        if found.shape != (2,) or found.is_floating_point() or int(found.min()) < 1:
            raise TensorMismatchError(f"{self.stored.names[name]}: {name!r} is {found.tolist()}, expected O and I")
        outputs, inputs = found.tolist()
        return outputs, inputs

    def group(self, stem: str, shape: tuple[int, int], packed: bool) -> Group:
        """Return the config group that a layer's tensors fit. Raises TensorMismatchError if none does."""
        words = self.matrix(stem + PACKED) if packed else None
        kind = "int" if packed else NAIVE.get(self.stored.dtype(stem + WEIGHT) or torch.float32, "none")
        grid = grid_of(self.stored.shape(stem + SCALE))
        zeros = stem + ZERO in self.stored.names
        dtype = self.stored.dtype(stem + SCALE)
        for group in self.terms.groups:
            fits = (group.format == "pack-quantized") == packed and group.kind == kind and group.grid(shape) == grid
            if words is not None:
                fits = fits and words == (shape[0], shape[1] * group.bits / WORD) and zeros != group.symmetric
            elif not group.symmetric:
                fits = fits and zeros
            if fits and dtype in FLOATS:
                return group
        wanted = "; ".join(f"{group.name}: {group}" for group in self.terms.groups)
        raise TensorMismatchError(
            f"compressed-tensors layer {stem!r} of {shape} has {'packed ' + str(words) if words else kind} values, "
            f"{dtype} scales {grid} and {'' if zeros else 'no '}zero points; {self.terms.where} says {wanted}"
        )

    def found(self, name: str) -> tuple[str, Group, tuple[int, int]] | None:
        """Return the layer of a weight, its group and its shape; None for any other tensor."""
        stem = name.removesuffix(WEIGHT)
        return (stem, *self.layers[stem]) if name.endswith(WEIGHT) and stem in self.layers else None

    def packed(self, name: str) -> Grouped | Rowwise | None:
        found = self.found(name)
        if found is None:
            return None
        stem, group, shape = found
        if group.format == "pack-quantized":
            return self.grouped(stem, group, shape)
        if group.kind == "int" and group.strategy == "channel" and stem + ZERO not in self.stored.names:
            return Rowwise(self.stored.read(name), self.stored.read(stem + SCALE).float().view(-1))
        return None

    def quantized(self, name: str) -> Quantized | None:
        found = self.found(name)
        if found is None:
            return None
        stem, group, shape = found
        if group.format == "pack-quantized":
            return self.grouped(stem, group, shape)
        scale, grid = self.stored.read(stem + SCALE), group.grid(shape)
        zero = self.stored.read(stem + ZERO) if stem + ZERO in self.stored.names else None
        if zero is not None and grid_of(tuple(zero.shape)) != grid:
            raise TensorMismatchError(
                f"compressed-tensors layer {stem!r}: zero points {tuple(zero.shape)} do not fit scales {grid}"
            )
        zero = None if zero is None else zero.view(grid)
        return Scaled(self.stored.read(name), scale.view(grid), zero, group.cell(shape), scale.dtype)

    def grouped(self, stem: str, group: Group, shape: tuple[int, int]) -> Grouped:
        """Return a packed layer. Values and zero points keep their offset, which their difference does not see."""
        (outputs, inputs), bits = shape, group.bits
        words, scale_GO = self.stored.read(stem + PACKED), self.stored.read(stem + SCALE).view(group.grid(shape)).T
        groups = len(scale_GO)
        zero_GO = torch.full((groups, outputs), 2 ** (bits - 1), dtype=torch.int16)
        if not group.symmetric:
            zero_GO = self.zero_points(stem, outputs, groups, bits)
        if words.dtype != torch.int32:
            raise TensorMismatchError(f"compressed-tensors layer {stem!r} is packed in {words.dtype}, expected int32")
        return Grouped(words.T, zero_GO, scale_GO, self.order(stem, group, inputs, groups), bits)

    def zero_points(self, stem: str, outputs: int, groups: int, bits: int) -> torch.Tensor:
        """Return the zero points of a packed layer with their offset, int16 (G, O)."""
        stored = self.stored.read(stem + ZERO)
        expected = (-(-outputs * bits // WORD), groups)
        if stored.dtype == torch.int8 and stored.shape == (outputs, groups):
            signed: torch.Tensor = stored.T.to(torch.int16)
            return signed.add(2 ** (bits - 1))
        if stored.dtype != torch.int32 or stored.shape != expected:
            raise TensorMismatchError(
                f"compressed-tensors layer {stem!r}: zero points {stored.dtype} {tuple(stored.shape)}, expected "
                f"int32 {expected}"
            )
        return unpack(stored.T, bits)[:, :outputs].to(torch.int16)

    def order(self, stem: str, group: Group, inputs: int, groups: int) -> torch.Tensor:
        """Return the group of each input (I,)."""
        in_order = torch.arange(inputs) // (group.inputs or inputs)
        if stem + INDEX not in self.stored.names:
            return in_order
        found = self.stored.read(stem + INDEX).long()
        if found.shape == (inputs,) and bool((found == -1).all()):
            return in_order
        if found.shape != (inputs,) or not torch.equal(found.sort().values, in_order):
            raise TensorMismatchError(
                f"compressed-tensors layer {stem!r}: weight_g_idx {tuple(found.shape)} does not give each of {groups} "
                f"groups {group.inputs or inputs} inputs"
            )
        return found

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        found = self.found(name)
        return None if found is None else found[2]

    def dtype(self, name: str) -> torch.dtype | None:
        found = self.found(name)
        return self.stored.dtype(name if found is None else found[0] + SCALE)


def grid_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of scales as rows and columns: older files drop the axes of length 1."""
    return shape if len(shape) == 2 else (*shape, 1, 1)[:2]
