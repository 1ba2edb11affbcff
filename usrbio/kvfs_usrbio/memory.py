"""The memory behind an object: its address and size, whoever made it.

Anything with a contiguous buffer (bytes, bytearray, memoryview, mmap, NumPy), or, for tensors that have none (torch on
the CPU), `__array_interface__` or DLPack. Nothing is copied and nothing of those libraries is imported.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from kvfs_usrbio._native import ffi, lib

Data = Any  # one of the objects above

DL_CPU: Final = 1
DL_CUDA_HOST: Final = 3  # pinned memory: ordinary memory to us


class _DLTensor(ctypes.Structure):
    """dlpack.h, the same in all versions that hand out a capsule named "dltensor"."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


class Memory:
    """`size` bytes at `address`, there at least until `release`."""

    __slots__ = ("_keep", "address", "native", "size")

    def __init__(self, address: int, size: int, keep: Any, native: Any) -> None:
        self.address = address
        self.size = size
        self.native = native  # char[] or char*
        self._keep = keep

    def release(self) -> None:
        # Not left to the collector: a traceback may keep a frame in a cycle, and a memoryview that is collected while it
        # has an export crashes CPython 3.11.
        if self._keep is None:
            ffi.release(self.native)
        self._keep = None
        self.native = None


def _contiguous(shape: list[int], strides: list[int], item: int) -> bool:
    expected = item
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != expected:
            return False
        expected *= extent
    return True


def _at(address: int, size: int, keep: Any) -> Memory:
    return Memory(address, size, keep, ffi.cast("char*", address))


def _of_interface(found: dict[str, Any], keep: Any, writable: bool) -> Memory:
    address, read_only = found["data"]
    shape = [int(n) for n in found["shape"]]
    item = int(found["typestr"][2:])
    strides = found.get("strides")
    if strides is not None and not _contiguous(shape, [int(n) for n in strides], item):
        raise BufferError("the array is not contiguous")
    if writable and read_only:
        raise BufferError("the array is read-only")
    size = item
    for extent in shape:
        size *= extent
    return _at(int(address), size, keep)


def _of_dlpack(data: Any) -> Memory:
    device = int(data.__dlpack_device__()[0])
    if device not in (DL_CPU, DL_CUDA_HOST):
        raise BufferError(f"memory of DLPack device type {device} is not on the CPU")
    capsule = data.__dlpack__()  # its destructor gives the memory back, since nobody takes it over
    tensor = _DLTensor.from_address(_pointer(capsule, b"dltensor"))
    shape = [int(tensor.shape[i]) for i in range(tensor.ndim)]
    item = int(tensor.bits) * int(tensor.lanes)
    if item % 8:
        raise BufferError(f"elements of {item} bits")
    if tensor.strides and not _contiguous(shape, [int(tensor.strides[i]) for i in range(tensor.ndim)], 1):
        raise BufferError("the tensor is not contiguous")
    size = item // 8
    for extent in shape:
        size *= extent
    return _at(int(tensor.data or 0) + int(tensor.byte_offset), size, (capsule, data))


def memory_of(data: Data, *, writable: bool) -> Memory:
    """TypeError: there is no memory to be had from it; BufferError: not contiguous, or read-only where that matters."""
    try:
        native = ffi.from_buffer("char[]", data, require_writable=writable)
    except TypeError:
        # What follows is for objects without a buffer; DLPack says nothing about being read-only before version 1.
        if hasattr(data, "__dlpack__"):
            return _of_dlpack(data)
        interface = getattr(data, "__array_interface__", None)
        if interface is None:
            raise
        return _of_interface(interface, data, writable)
    return Memory(lib.kvfs_py_address(native), len(native), None, native)
