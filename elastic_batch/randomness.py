"""The global random generators of Python, numpy and torch: seeded for a piece of work, then put back as they were.

The pure function that gives the seed of a micro-batch is `elastic_batch.stream.micro_batch_seed`.
"""

from __future__ import annotations

import ctypes
import platform
import random
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any, Self, cast

import numpy as np
import torch

_MT19937_BYTES = 625 * 4  # 624 words of key and the position in it
_python_generator = cast(Any, random)._inst  # of which the module's functions are methods
_seed_by_integer = cast(Any, random.Random.__base__).seed  # of all that random.seed takes, at half its cost


def reseed(seed: int, device: torch.device | None = None) -> None:
    """Seed `random`, numpy's legacy generator, torch's CPU generator and, if given, that of a CUDA device.

    Costs about 10 microseconds. It does not remember what the generators held: see `GeneratorState` and `seeded`.

    Args:
        seed: From 0 to 2^63 - 1, as `micro_batch_seed` gives.
        device: Its generator is seeded too if it is a CUDA device.
    """
    _seed_by_integer(_python_generator, seed)
    _python_generator.gauss_next = None
    # numpy and torch (CPU) run the same Mersenne twister and look at 32 bits: they must not look at the same ones.
    np.random.seed(seed >> 31)
    reseed_torch(seed, device)


def reseed_torch(seed: int, device: torch.device | None = None) -> None:
    """As `reseed`, without Python's and numpy's generators, which take most of its time."""
    torch.default_generator.manual_seed(seed)
    if (generator := cuda_generator(device)) is not None:
        generator.manual_seed(seed)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run a block under seeded generators and put them back afterwards, whatever happens inside.

    For many blocks in a row it is cheaper to enter `preserved` once and call `reseed` for each.

    >>> before = random.getstate()
    >>> with seeded(1):
    ...     first = random.random(), float(torch.rand(()))
    >>> with seeded(1):
    ...     first == (random.random(), float(torch.rand(())))
    True
    >>> random.getstate() == before
    True
    """
    with preserved(device):
        reseed(seed, device)
        yield


def preserved(device: torch.device | None = None) -> AbstractContextManager[object]:
    """Put the generators back after a block that may `reseed` and draw at will."""
    return GeneratorState(device)


class GeneratorState:
    """What the global generators hold at the moment of construction; `restore` may be called any number of times.

    As a context it restores at the end.

    Args:
        device: A CUDA device's generator is included.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._python = _PythonState()
        self._numpy = _NumpyState()
        self._torch = torch.default_generator.get_state()
        self._cuda_generator = cuda_generator(device)
        self._cuda = None if self._cuda_generator is None else self._cuda_generator.get_state()

    def restore(self) -> None:
        """Put the generators back as they were."""
        self._python.restore()
        self._numpy.restore()
        self.restore_torch()

    def restore_torch(self) -> None:
        """Put torch's generators back only."""
        torch.default_generator.set_state(self._torch)
        if self._cuda_generator is not None and self._cuda is not None:
            self._cuda_generator.set_state(self._cuda)

    def is_current(self) -> bool:
        """Whether nobody drew meanwhile; False too where the layouts of Python's or numpy's are unknown."""
        states = [(torch.default_generator, self._torch), (self._cuda_generator, self._cuda)]
        return self.others_are_untouched() and all(
            generator is None or state is None or torch.equal(generator.get_state(), state)
            for generator, state in states
        )

    def others_are_untouched(self) -> bool:
        """Whether Python's and numpy's generators hold what they did; False too where their layouts are unknown."""
        return self._python.is_current() and self._numpy.is_current()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


class _PythonState:
    """The state of Python's generator.

    `random.getstate` and `setstate` make 625 integers and take them apart, which costs as much as all else that seeding
    an update does. So the state is copied as bytes where its layout is as expected.
    """

    def __init__(self) -> None:
        self._words = _python_words()
        if self._words is None:
            self._full: Any = random.getstate()
        else:
            self._bytes = bytes(self._words)
            self._half = _python_generator.gauss_next

    def is_current(self) -> bool:
        if self._words is None:
            return False
        return bytes(self._words) == self._bytes and bool(_python_generator.gauss_next == self._half)

    def restore(self) -> None:
        if self._words is None:
            random.setstate(self._full)
        else:
            self._words[:] = self._bytes
            _python_generator.gauss_next = self._half


class _NumpyState:
    """The legacy generator's state, including the second half of a pair of normal draws that it may keep.

    numpy's own get_state and set_state take over 100 microseconds, far more than all the others together. So the state
    is copied as bytes where its layout is as expected.
    """

    def __init__(self) -> None:
        self._source = np.random.get_bit_generator()  # type: ignore[attr-defined]  # missing in numpy's stubs
        words, half = _numpy_words(self._source), _numpy_half()
        if words is None or half is None:
            self._memory: tuple[memoryview, memoryview] | None = None
            self._full = np.random.get_state(legacy=False)
        else:
            self._memory = words, half
            self._bytes = bytes(words), bytes(half)

    def is_current(self) -> bool:
        is_same = np.random.get_bit_generator() is self._source  # type: ignore[attr-defined]  # missing in numpy's stubs
        if self._memory is None or not is_same:
            return False
        return all(bytes(part) == content for part, content in zip(self._memory, self._bytes, strict=True))

    def restore(self) -> None:
        if np.random.get_bit_generator() is not self._source:  # type: ignore[attr-defined]  # missing in numpy's stubs
            np.random.set_bit_generator(self._source)  # type: ignore[attr-defined]  # the same
        if self._memory is None:
            np.random.set_state(self._full)
        else:
            for part, content in zip(self._memory, self._bytes, strict=True):
                part[:] = content


def _memory_at(address: int, size: int) -> memoryview:
    """Bytes of this process. Copying them keeps the interpreter, so no other thread draws from half a state."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


@lru_cache
def _python_words() -> memoryview | None:
    """Where Python's global generator has its state; None where its layout is not as expected."""
    is_expected = type(_python_generator) is random.Random
    is_large = random.Random.__basicsize__ >= object.__basicsize__ + _MT19937_BYTES
    if platform.python_implementation() != "CPython" or not is_expected or not is_large:
        return None
    probe = random.Random(1)
    *key, position = probe.getstate()[1]
    expected = np.array([position, *key], np.uint32).tobytes()
    if bytes(_memory_at(id(probe) + object.__basicsize__, _MT19937_BYTES)) != expected:
        return None
    return _memory_at(id(_python_generator) + object.__basicsize__, _MT19937_BYTES)


@lru_cache(maxsize=1)  # which keeps the generator: its memory stays where it is
def _numpy_words(source: Any) -> memoryview | None:
    """Where a bit generator of numpy has its state; None where its layout is not as expected."""
    if type(source) is not np.random.MT19937:
        return None
    probe = np.random.MT19937(1)
    state = probe.state["state"]
    expected = np.append(state["key"], np.uint32(state["pos"])).astype(np.uint32).tobytes()
    if bytes(_memory_at(probe.ctypes.state_address, _MT19937_BYTES)) != expected:
        return None
    return _memory_at(source.ctypes.state_address, _MT19937_BYTES)


@lru_cache
def _numpy_half() -> memoryview | None:
    """Where numpy's legacy generator keeps the second half of a pair of normal draws, and whether it has one.

    None where that is not found as expected: an integer and a number, next to each other in the object.
    """
    kept: Any = getattr(np.random.mtrand, "_rand", None)
    if platform.python_implementation() != "CPython" or type(kept) is not np.random.RandomState:
        return None
    probe = np.random.RandomState(1)
    memory = _memory_at(id(probe), np.random.RandomState.__basicsize__)
    probe.standard_normal()
    half = probe.get_state(legacy=False)["gauss"]
    offset = bytes(memory).find(struct.pack("=ixxxxd", 1, half))
    if offset < 0:
        return None
    found = memory[offset : offset + 16]
    full = bytes(found)
    is_as_expected = probe.standard_normal() == half and not any(found)
    found[:] = full
    if not is_as_expected or probe.standard_normal() != half:
        return None
    return _memory_at(id(kept) + offset, len(full))


def cuda_generator(device: torch.device | None) -> torch.Generator | None:
    """The global generator of a CUDA device; None for other devices."""
    if device is None or device.type != "cuda":
        return None
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
