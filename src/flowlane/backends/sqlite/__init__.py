"""``sqlite:///path``: log, queue and channels in one file, shared by the processes of one machine.

``backend`` is the face to the loop, ``writer`` the one thread that writes, ``group`` what it writes,
``channel`` the channels, ``schema`` the file. Every write goes through the writer, which takes whatever waits
into one transaction; reads have a connection and a thread of their own, so that they wait for no writer.
"""

from __future__ import annotations

from flowlane.backends.sqlite.backend import open_backend

__all__ = ["open_backend"]
