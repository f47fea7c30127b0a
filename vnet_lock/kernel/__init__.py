"""What the kernel knows and does: read_ observes, add_/set_/remove_/bind_ change."""
