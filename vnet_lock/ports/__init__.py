"""Kernel implementations, one file each: what a guest's interface can be on this host."""
