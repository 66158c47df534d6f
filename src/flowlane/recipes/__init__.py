"""The jobs that ship with flowlane: lanes made of the public API, ready to be named in a ten-line file."""

from flowlane.recipes.http_archive import http_archive

__all__ = ["http_archive"]
