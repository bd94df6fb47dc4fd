"""The global random generators of Python, numpy and torch: seeded for a piece of work, then put back as they were.

The pure function that gives the seed of a micro-batch is `elastic_batch.stream.micro_batch_seed`.
"""

from __future__ import annotations

import ctypes
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch

_MT19937_BYTES = 625 * 4  # 624 words of key and the position in it


def reseed(seed: int, device: torch.device | None = None) -> None:
    """Seed `random`, numpy's legacy generator, torch's CPU generator and, if given, that of a CUDA device.

    Costs about 10 microseconds. It does not remember what the generators held: see `GeneratorState` and `seeded`.

    Args:
        seed: From 0 to 2^63 - 1, as `micro_batch_seed` gives.
        device: Its generator is seeded too if it is a CUDA device.
    """
    random.seed(seed)
    # numpy and torch (CPU) run the same Mersenne twister and look at 32 bits: they must not look at the same ones.
    np.random.seed(seed >> 31)
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


@contextmanager
def preserved(device: torch.device | None = None) -> Iterator[None]:
    """Put the generators back after a block that may `reseed` and draw at will."""
    state = GeneratorState(device)
    try:
        yield
    finally:
        state.restore()


class GeneratorState:
    """What the global generators hold at the moment of construction; `restore` may be called any number of times.

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
        torch.default_generator.set_state(self._torch)
        if self._cuda_generator is not None and self._cuda is not None:
            self._cuda_generator.set_state(self._cuda)


class _PythonState:
    """The state of Python's generator.

    `random.getstate` and `setstate` make 625 integers and take them apart, which costs as much as all else that seeding
    an update does. So the state is copied as bytes where its layout is as expected.
    """

    def __init__(self) -> None:
        self._source = cast(Any, random._inst)  # of which the module's functions are methods
        self._full: Any = None
        if not _python_layout_is_known():
            self._full = random.getstate()
            return
        self._bytes = ctypes.string_at(id(self._source) + object.__basicsize__, _MT19937_BYTES)
        self._half = self._source.gauss_next

    def restore(self) -> None:
        if self._full is not None:
            random.setstate(self._full)
            return
        _write(id(self._source) + object.__basicsize__, self._bytes)
        self._source.gauss_next = self._half


def _write(address: int, state: bytes) -> None:
    # Unlike memmove this keeps the interpreter: no other thread draws from half a state.
    (ctypes.c_char * len(state)).from_address(address).raw = state


@lru_cache
def _python_layout_is_known() -> bool:
    is_expected = type(random._inst) is random.Random
    is_large = random.Random.__basicsize__ >= object.__basicsize__ + _MT19937_BYTES
    if platform.python_implementation() != "CPython" or not is_expected or not is_large:
        return False
    probe = random.Random(1)
    *key, position = probe.getstate()[1]
    expected = np.array([position, *key], np.uint32).tobytes()
    return ctypes.string_at(id(probe) + object.__basicsize__, _MT19937_BYTES) == expected


class _NumpyState:
    """The legacy generator's state, including the second half of a pair of normal draws that it may keep.

    numpy's own get_state and set_state take over 100 microseconds, far more than all the others together. So the state
    is copied as bytes where its layout is as expected, and numpy's functions do the rest.
    """

    def __init__(self) -> None:
        self._source = np.random.get_bit_generator()  # type: ignore[attr-defined]  # missing in numpy's stubs
        self._full: Any = None  # what set_state takes, where the bytes are not enough
        if not _numpy_layout_is_known(type(self._source)):
            self._full = np.random.get_state(legacy=False)
            return
        self._address = self._source.ctypes.state_address
        self._bytes = ctypes.string_at(self._address, _MT19937_BYTES)
        # The kept half cannot be read, only drawn. A draw that leaves the state alone came from it.
        half = np.random.standard_normal()
        if ctypes.string_at(self._address, _MT19937_BYTES) == self._bytes:
            words = np.frombuffer(self._bytes, np.uint32)
            self._full = ("MT19937", words[:-1], int(words[-1]), 1, half)
        self.restore()

    def restore(self) -> None:
        np.random.set_bit_generator(self._source)  # type: ignore[attr-defined]  # which forgets a kept half
        if self._full is not None:
            np.random.set_state(self._full)
        else:
            _write(self._address, self._bytes)


@lru_cache
def _numpy_layout_is_known(kind: type) -> bool:
    if kind is not np.random.MT19937:
        return False
    probe = np.random.MT19937(1)
    state = probe.state["state"]
    expected = np.append(state["key"], np.uint32(state["pos"])).astype(np.uint32).tobytes()
    return ctypes.string_at(probe.ctypes.state_address, _MT19937_BYTES) == expected


def cuda_generator(device: torch.device | None) -> torch.Generator | None:
    """The global generator of a CUDA device; None for other devices."""
    if device is None or device.type != "cuda":
        return None
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
