"""Addresses of folders and files that are not on this machine's file systems."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from molmo2_nemo.errors import UserError

HERE = ("file", "local")  # schemes of files of this machine


@dataclass(frozen=True, slots=True)
class Address:
    """Such as s3://bucket/folder, without a slash at its end; read like a `Path`."""

    url: str

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        return Address(self.url.rpartition("/")[0])

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0].lower()


def is_url(text: str | Path | Address) -> bool:
    return isinstance(text, Address) or "://" in str(text)


def place_of(text: str | Path | Address) -> Path | Address:
    """A path as it is, file:///path as a path, another URL as an address.

    Raises:
        UserError: a URL without a place, or one of several chained by `::`.
    """
    if isinstance(text, (Path, Address)):
        return text
    scheme, found, rest = text.partition("://")
    if not found:
        return Path(text)
    if scheme.lower() in HERE:
        return Path(rest)
    if "::" in text or not scheme or not rest.strip("/") and scheme != "memory":
        raise UserError(f"{text} is not the address of a folder; such as s3://bucket/folder is")
    return Address(text.rstrip("/"))
