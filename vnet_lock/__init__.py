"""vnet-lock: an SR-IOV virtual function is never used by two guests."""
