"""QEMU implementations, one file each: how a guest is connected to a port."""
