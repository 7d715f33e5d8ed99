# mypy: ignore-errors
"""Pieces of LLVM's own language that the tiles are written with, through llvmlite. Addresses are whole numbers."""

from __future__ import annotations

from llvmlite import ir

WORD, INT, HALF, BYTE = (ir.IntType(bits) for bits in (64, 32, 16, 8))


def number(count: int) -> ir.Constant:
    return ir.Constant(WORD, count)


def load(builder, address, kind):
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def store(builder, value, address):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def spread(builder, scalar, lanes: int):
    """Return a vector with a number in every lane."""
    nothing = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(nothing, scalar, ir.Constant(INT, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))


def counted(builder, times, starts, steps, body) -> None:
    """Build `times` rounds of body(*values), at least one. The values begin at `starts`; the first of them grow by
    `steps`, and body returns what the others are in the next round."""
    before, inside, after = builder.block, builder.append_basic_block("rounds"), builder.append_basic_block("done")
    builder.branch(inside)
    builder.position_at_end(inside)
    done, values = builder.phi(WORD), [builder.phi(start.type) for start in starts]
    grown = [builder.add(value, step) for value, step in zip(values, steps, strict=False)]
    following = builder.add(done, number(1))
    later = [following, *grown, *body(*values)]
    last = builder.block
    for phi, start, next_one in zip([done, *values], [number(0), *starts], later, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(next_one, last)
    builder.cbranch(builder.icmp_signed("<", following, times), inside, after)
    builder.position_at_end(after)
