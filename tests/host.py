"""`forbids_host_reads()`: within it no operation may wait for a device, tried on a CPU."""

from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result's size or value the host has to know, by torch's names.
READING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero", "bincount")


class forbids_host_reads(TorchDispatchMode):  # noqa: N801 - used as a function
    """Refuses what would let the host wait for a GPU.

    A copy to the host cannot be told from any other on a CPU; the meta device refuses it, so run the same code there, too.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        is_sized = name != "repeat_interleave" or kwargs.get("output_size") is not None
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype.itemsize == 1 for i in args[1])
        if any(word in name for word in READING) or not is_sized or by_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)
