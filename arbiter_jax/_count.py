"""Numbers that a long run can count with: examples beyond 2^31, sums in float32 beyond 2^24.

JAX has no 64-bit integers by default. An int32 wraps at 2^31, which a run on tokens passes within
hours, and a float32 of 2^24 plus 1 is 2^24.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORD = 2**32
_LARGEST_INT32 = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Count:
    """A number of examples in two 32-bit words, ``high * 2**32 + low``: it never wraps.

    It is a pytree of two arrays, and ``int(count)`` reads it on the host. Both inside and outside
    ``jax.jit``, adding a whole number >= 0 and comparing with one of any size are exact;
    ``count // n`` is exact, an int32 that stops at 2^31 - 1; ``a - b`` is the exact difference,
    rounded once to a float. Everything else sees ``jnp.asarray(count)``, a float of the default
    type, so that functions of an array go on working; it cannot tell neighbors apart beyond 2^24.

    >>> count = as_count(2**31 - 1) + 8
    >>> int(count), bool(count >= 2**31 + 7), float(count - 2**31)
    (2147483655, True, 7.0)
    """

    high: jax.Array  # shape=(), dtype=uint32
    low: jax.Array  # shape=(), dtype=uint32

    __array_ufunc__ = None  # a NumPy number on the left leaves the operation to the methods below

    def since(self, earlier: Count) -> jax.Array:
        """How many examples came after an earlier count: int32[], in [0, 2^31 - 1]."""
        difference = _minus(self, earlier).astype(jnp.int32)
        return jnp.where(_less(self, earlier), 0, difference)

    def minus(self, number: Any) -> Count:
        """The count that a number >= 0 of examples comes before this one; at least 0."""
        number = to_count(number)
        behind, difference = _less(self, number), _minus(self, number)
        return Count(*(jnp.where(behind, 0, w) for w in (difference.high, difference.low)))

    def astype(self, dtype: Any) -> jax.Array:
        """The number as an array; an integer type that cannot hold it gets its largest number."""
        if not jnp.issubdtype(dtype, jnp.integer):
            # Not `float(self)`: the words of a traced count have no concrete values.
            high, low = (jnp.asarray(word).astype(float) for word in (self.high, self.low))
            return (high * 2.0**32 + low).astype(dtype)
        largest = min(jnp.iinfo(dtype).max, _WORD - 1)
        fits = (jnp.asarray(self.high) == 0) & (jnp.asarray(self.low) <= jnp.uint32(largest))
        return jnp.where(fits, self.low, jnp.uint32(largest)).astype(dtype)

    def __jax_array__(self) -> jax.Array:
        return self.astype(float)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        del copy
        high, low = np.asarray(self.high, np.uint64), np.asarray(self.low, np.uint64)
        return np.asarray(high * np.uint64(_WORD) + low).astype(dtype or np.int64)

    def __int__(self) -> int:
        return (int(self.high) << 32) + int(self.low)

    __index__ = __int__

    def __float__(self) -> float:
        return float(int(self))

    def __bool__(self) -> bool:
        return int(self) > 0

    def __format__(self, spec: str) -> str:
        return format(int(self), spec)

    def __repr__(self) -> str:
        try:
            return f"Count({int(self)})"
        except (TypeError, ValueError):  # traced, stacked, or anything that JAX maps over
            return f"Count(high={self.high!r}, low={self.low!r})"

    def __add__(self, other: Any) -> Any:
        other = _exactly(other)
        if not isinstance(other, Count):
            return self.astype(float) + other
        low = jnp.add(self.low, other.low)
        carry = (low < other.low).astype(jnp.uint32)
        return Count(jnp.add(self.high, other.high) + carry, low)

    __radd__ = __add__

    def __sub__(self, other: Any) -> jax.Array:
        other = _exactly(other)
        if not isinstance(other, Count):
            return self.astype(float) - other
        behind = _less(self, other)
        return jnp.where(
            behind, -_minus(other, self).astype(float), _minus(self, other).astype(float)
        )

    def __rsub__(self, other: Any) -> jax.Array:
        return -(self - other)

    def __floordiv__(self, other: Any) -> jax.Array:
        divisor = _exactly(other)
        if not isinstance(divisor, Count):
            return self.astype(float) // other
        # A quotient of floats, then what it is wrong by: twice, because the first has 24 bits.
        size, quotient = divisor.astype(float), jnp.zeros((), jnp.int32)
        for _ in range(2):
            missing = jnp.floor((self - _times(divisor, quotient)) / size)
            missing = jnp.clip(missing, -1024, 2.0**31 - 256).astype(jnp.int32)
            quotient = quotient + jnp.minimum(missing, _LARGEST_INT32 - quotient)
        product = _times(divisor, quotient)
        enough = ~_less(_minus(self, product), divisor) & (quotient < _LARGEST_INT32)
        larger = jnp.where(enough, quotient + 1, quotient)
        return jnp.where(_less(self, product), quotient - 1, larger)

    def __mod__(self, other: Any) -> jax.Array:
        divisor = _exactly(other)
        if not isinstance(divisor, Count):
            return self.astype(float) % other
        return self - _times(divisor, self // divisor)

    def __mul__(self, other: Any) -> jax.Array:
        return self.astype(float) * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> jax.Array:
        return self.astype(float) / other

    def __rtruediv__(self, other: Any) -> jax.Array:
        return other / self.astype(float)

    def __neg__(self) -> jax.Array:
        return -self.astype(float)

    def __lt__(self, other: Any) -> Any:
        return _compare(self, other, _less, operator.lt)

    def __le__(self, other: Any) -> Any:
        return _compare(self, other, lambda a, b: ~_less(b, a), operator.le)

    def __gt__(self, other: Any) -> Any:
        return _compare(self, other, lambda a, b: _less(b, a), operator.gt)

    def __ge__(self, other: Any) -> Any:
        return _compare(self, other, lambda a, b: ~_less(a, b), operator.ge)

    def __eq__(self, other: Any) -> Any:
        if isinstance(other, Count) and not isinstance(
            self.high, (jax.Array, np.ndarray, np.generic)
        ):  # `jax.tree.map` may have replaced the words, for example by dtypes or shardings
            return (self.high, self.low) == (other.high, other.low)
        return _compare(self, other, _equal, operator.eq)

    def __ne__(self, other: Any) -> Any:
        return _compare(self, other, lambda a, b: ~_equal(a, b), operator.ne)

    __hash__ = None  # type: ignore[assignment]


def as_count(value: Any) -> Count:
    """A number of examples as a :class:`Count`, from an argument of a user.

    Args:
      value: A :class:`Count`, a whole number >= 0 of Python or NumPy below 2^64, or an array [] of
        integers or floats, traced or not. The value of an array of JAX is not waited for: its whole
        part is counted, and 0 for one that is less than 0 or not finite.

    Raises:
      ValueError: If it is anything else.

    >>> int(as_count(10**13)), int(as_count(jnp.int32(7))), int(as_count(jnp.float32(2.5)))
    (10000000000000, 7, 2)
    """
    if isinstance(value, Count | int):
        is_count = isinstance(value, Count) or 0 <= value < _WORD**2
    elif isinstance(value, jax.Array):
        is_count = value.ndim == 0 and not jnp.iscomplexobj(value)
    else:
        is_scalar = isinstance(value, float | np.number | np.ndarray) and np.ndim(value) == 0
        number = (
            np.asarray(value).item() if is_scalar else None
        )  # of Python: compared without overflow
        is_count = isinstance(number, int | float) and 0 <= number < _WORD**2 and number % 1 == 0
    if not is_count:
        found = f"an array of shape {np.shape(value)}" if np.ndim(value) else repr(value)
        raise ValueError(
            "a count of examples, such as num_examples, must be one whole number >= 0 and < 2**64, got "
            f"{found}."
        )
    return to_count(value)


def to_count(value: Any) -> Count:
    """A number, or an array of them, as a :class:`Count`: the whole part, 0 for less than 0 or nan."""
    if isinstance(value, Count):
        return value
    if isinstance(value, (float, np.floating)):
        value = int(value) if np.isfinite(value) else 0
    if isinstance(value, (int, np.integer)):
        number = min(max(int(value), 0), _WORD**2 - 1)
        return Count(_word(number // _WORD), _word(number % _WORD))
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        numbers = np.maximum(value, 0).astype(np.uint64)
        high, low = (numbers >> np.uint64(32)), numbers & np.uint64(_WORD - 1)
        return Count(_word(high.astype(np.uint32)), _word(low.astype(np.uint32)))
    value = jnp.maximum(jnp.asarray(value), 0)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        value = jnp.floor(jnp.nan_to_num(value, posinf=0.0))
        high = jnp.floor(value / 2.0**32)
        return Count(_word(high), _word(value - high * 2.0**32))
    wide = value.dtype.itemsize > 4
    return Count(_word(value >> 32 if wide else jnp.zeros_like(value)), _word(value))


def compensated_sum(
    total: jax.Array, error: jax.Array, term: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Kahan's sum: (total + term, what rounding has added to it so far), from such a pair.

    >>> total, error = jnp.float32(2**24), jnp.float32(0)
    >>> for _ in range(4):
    ...     total, error = compensated_sum(total, error, jnp.float32(1))
    >>> int(total) - 2**24
    4
    """
    term = term - error
    new = total + term
    return new, (new - total) - term


def _word(value: Any) -> jax.Array:
    # `asarray` of a Python number that fits, `astype` of an array, which takes its lower 32 bits.
    return jnp.asarray(value, jnp.uint32 if isinstance(value, int) else None).astype(jnp.uint32)


def _exactly(other: Any) -> Any:
    """A whole number as a Count; anything else as it is."""
    if isinstance(other, (int, np.integer)):
        return to_count(other)
    is_whole = hasattr(other, "dtype") and jnp.issubdtype(other.dtype, jnp.integer)
    return to_count(other) if is_whole else other


def _compare(count: Count, other: Any, exact: Callable[..., Any], plain: Callable[..., Any]) -> Any:
    whole = _exactly(other)
    if not isinstance(whole, Count):
        if not isinstance(other, float) and not hasattr(other, "dtype"):
            return NotImplemented
        return plain(count.astype(float), other)
    result = exact(count, whole)
    if isinstance(other, Count) or (isinstance(other, int) and other >= 0):
        return result
    return jnp.where(jnp.asarray(other < 0), plain(0, -1), result)


def _less(a: Count, b: Count) -> jax.Array:
    a, b = _on_device(a), _on_device(b)
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def _equal(a: Count, b: Count) -> jax.Array:
    a, b = _on_device(a), _on_device(b)
    return (a.high == b.high) & (a.low == b.low)


def _minus(a: Count, b: Count) -> Count:
    """The difference of two counts, the larger one first."""
    a, b = _on_device(a), _on_device(b)
    borrow = (a.low < b.low).astype(jnp.uint32)
    return Count(a.high - b.high - borrow, a.low - b.low)


def _times(a: Count, factor: jax.Array) -> Count:
    """The product with an int32 >= 0, by halves of words whose products fit into one."""
    a, b = _on_device(a), jnp.asarray(factor).astype(jnp.uint32)
    half = lambda word: (word >> 16, word & 0xFFFF)
    (a1, a0), (b1, b0) = half(a.low), half(b)
    middle = ((a0 * b0) >> 16) + ((a1 * b0) & 0xFFFF) + ((a0 * b1) & 0xFFFF)
    high = a1 * b1 + ((a1 * b0) >> 16) + ((a0 * b1) >> 16) + (middle >> 16)
    return Count(a.high * b + high, a.low * b)


def _on_device(count: Count) -> Count:
    # Words that `jax.device_get` has read are NumPy's, whose scalars warn when they wrap.
    return Count(jnp.asarray(count.high), jnp.asarray(count.low))
