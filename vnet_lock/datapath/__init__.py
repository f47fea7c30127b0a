"""Processes of our own that carry a guest's packets, or tell the kernel how to. Each ends with its guest."""
