"""Sixteen float32 at once, for numba: what the compiler's own vectors would be, if it made them.

It makes them half as wide as the processor's, and works off what is left of each row one number
at a time. A ``Lanes`` is one such vector: 64 bytes, the cache's line and AVX-512's register; on
other processors the compiler cuts it into two or four.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model
from numba.np.arrayobj import make_array

LANES = 16
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _WHOLE = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)


class Lanes(types.Type):
    """Type of a vector."""

    def __init__(self) -> None:
        super().__init__("Lanes")


lanes = Lanes()


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, _VECTOR)


def _place(context, builder, array, value, i, j):  # type: ignore[no-untyped-def]
    """Address of value[i, j], an array of float32 whose rows are contiguous."""
    made = make_array(array)(context, builder, value)
    start = builder.ptrtoint(made.data, _I64)
    row = builder.mul(i, cgutils.unpack_tuple(builder, made.strides)[0])
    place = builder.add(start, builder.add(row, builder.mul(j, _I64(4))))
    return builder.inttoptr(place, _VECTOR.as_pointer())


def _spread(builder, number, kind):  # type: ignore[no-untyped-def]
    none = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(none, number, _I32(0))
    return builder.shuffle_vector(one, none, ir.Constant(_WHOLE, [0] * LANES))


def _call(builder, name, result, arguments, **options):  # type: ignore[no-untyped-def]
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments, **options)


@intrinsic
def load(context, array, i, j):  # type: ignore[no-untyped-def]
    """array[i, j : j + LANES]."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector = builder.load(_place(context, builder, signature.args[0], *args))
        vector.align = 4
        return vector

    return lanes(array, types.intp, types.intp), code


@intrinsic
def load_some(context, array, i, j, count):  # type: ignore[no-untyped-def]
    """array[i, j : j + count], then zeros: nothing behind it is touched."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = _place(context, builder, signature.args[0], *args[:3])
        count = _spread(builder, builder.trunc(args[3], _I32), _WHOLE)
        mask = builder.icmp_signed("<", ir.Constant(_WHOLE, list(range(LANES))), count)
        rest = [place, _I32(4), mask, ir.Constant(_VECTOR, [0.0] * LANES)]
        return _call(builder, "llvm.masked.load.v16f32.p0", _VECTOR, rest)

    return lanes(array, types.intp, types.intp, types.intp), code


@intrinsic
def store(context, array, i, j, vector):  # type: ignore[no-untyped-def]
    """array[i, j : j + LANES] = vector."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = _place(context, builder, signature.args[0], *args[:3])
        builder.store(args[3], place).align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, lanes), code


@intrinsic
def splat(context, number):  # type: ignore[no-untyped-def]
    """The same number in all lanes."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _spread(builder, args[0], _VECTOR)

    return lanes(types.float32), code


@intrinsic
def kept(context, number):  # type: ignore[no-untyped-def]
    """The number itself, of which the compiler no longer knows that it is a constant.

    It would rather make constants anew for each vector than keep them in registers.
    """

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        bits, kind = builder.bitcast(args[0], _I32), ir.FunctionType(_I32, [_I32])
        return builder.bitcast(builder.asm(kind, "", "=r,0", [bits], False), _F32)

    return types.float32(types.float32), code


def _by_lane(name):  # type: ignore[no-untyped-def]
    @intrinsic
    def operation(context, x, y):  # type: ignore[no-untyped-def]
        # The flag keeps numba from adding those of fastmath, by which x + y - y would be x.
        def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return getattr(builder, name)(*args, flags=("contract",))

        return lanes(lanes, lanes), code

    return operation


add, sub, mul = _by_lane("fadd"), _by_lane("fsub"), _by_lane("fmul")


@intrinsic
def fma(context, x, y, z):  # type: ignore[no-untyped-def]
    """x * y + z, in one operation where the processor has it."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _call(builder, "llvm.fmuladd.v16f32", _VECTOR, args)

    return lanes(lanes, lanes, lanes), code


@intrinsic
def maximum(context, x, y):  # type: ignore[no-untyped-def]
    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        flags = ("nnan", "nsz")
        return _call(builder, "llvm.maxnum.v16f32", _VECTOR, args, fastmath=flags)

    return lanes(lanes, lanes), code


@intrinsic
def at_least(context, x, y):  # type: ignore[no-untyped-def]
    """1 where x >= y, else 0."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        one, zero = (ir.Constant(_VECTOR, [number] * LANES) for number in (1.0, 0.0))
        return builder.select(builder.fcmp_ordered(">=", *args), one, zero)

    return lanes(lanes, lanes), code


@intrinsic
def largest(context, x):  # type: ignore[no-untyped-def]
    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        name = "llvm.vector.reduce.fmax.v16f32"
        return _call(builder, name, _F32, args, fastmath=("nnan", "nsz"))

    return types.float32(lanes), code


@intrinsic
def total(context, x):  # type: ignore[no-untyped-def]
    """Sum of the lanes, in any order."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        name, zero = "llvm.vector.reduce.fadd.v16f32", ir.Constant(_F32, -0.0)
        return _call(builder, name, _F32, [zero, args[0]], fastmath=("fast",))

    return types.float32(lanes), code


@intrinsic
def add_to_exponent(context, p, shifted):  # type: ignore[no-untyped-def]
    """p * 2 ** whole, for whole numbers that were rounded by adding 1.5 * 2 ** 23 to them.

    They are in the last bits of the sum, from where they are added to the bits of p's exponent.
    """

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        power = builder.shl(builder.bitcast(args[1], _WHOLE), ir.Constant(_WHOLE, [23] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(args[0], _WHOLE), power), _VECTOR)

    return lanes(lanes, lanes), code
