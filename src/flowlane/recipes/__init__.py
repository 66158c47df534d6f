"""The jobs that ship with flowlane: lanes made of the public API, ready to be named in a ten-line file."""

from flowlane.recipes.http_archive import http_archive
from flowlane.recipes.zip_tables import zip_tables

__all__ = ["http_archive", "zip_tables"]
