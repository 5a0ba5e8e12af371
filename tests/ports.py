"""Ports for servers of a test."""

import random
import socket

# Below those that the system deals out: a server may take a minute to bind its port, and any socket that it or another
# process opens meanwhile could have been dealt the very same.
CHOICES = range(20_000, 32_000)


def free_port():
    """A port of 127.0.0.1 that nothing listens on. OSError if there is none."""
    for port in random.SystemRandom().sample(CHOICES, 100):
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of 100 ports in {CHOICES} of 127.0.0.1 is free")
