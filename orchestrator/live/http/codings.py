"""Reads bodies that clients have compressed, chunk by chunk, so that none grows beyond what a body may have."""

import zlib

from orchestrator.live.http.errors import ACCEPTED_CODINGS, HttpError

#: `zlib` is to read: gzip's members, or a zlib stream, or (some clients call that deflate) the bare one.
_GZIP, _ZLIB, _BARE = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


class Plain:
    """Passes a body on as it is.

    Args:
        bytes_max: of all of it.
    """

    def __init__(self, bytes_max: int) -> None:
        self._left = self._bytes_max = bytes_max

    def add(self, data: bytes) -> bytes:
        """Return what more of it says. Raises `HttpError` 413 beyond the limit, 400 for what was not compressed so."""
        self._left -= len(data)
        if self._left < 0:
            raise too_large(self._bytes_max)
        return data

    def finish(self) -> None:
        """See that it is whole. Raises `HttpError` 400 if not."""


class Compressed(Plain):
    """Reads a gzip or deflate body."""

    def __init__(self, coding: str, bytes_max: int) -> None:
        super().__init__(bytes_max)
        self._coding = coding
        self._members = coding == "gzip"
        #: None until two bytes have told which kind of deflate it is.
        self._inflate = zlib.decompressobj(_GZIP) if self._members else None
        self._begun = b""

    def add(self, data: bytes) -> bytes:
        if self._inflate is None:
            self._begun += data
            if len(self._begun) < 2:
                return b""
            data, self._inflate = self._begun, zlib.decompressobj(_kind(self._begun))
        parts: list[bytes] = []
        while data:
            if self._inflate.eof:
                if not self._members:
                    raise self._malformed("it goes on after its end")
                self._inflate = zlib.decompressobj(_GZIP)
            try:
                part = self._inflate.decompress(data, self._left + 1)
            except zlib.error as error:
                raise self._malformed(str(error)) from error
            parts.append(super().add(part))
            data = self._inflate.unconsumed_tail or self._inflate.unused_data
        return b"".join(parts)

    def finish(self) -> None:
        if self._inflate is None or not self._inflate.eof:
            raise self._malformed("it ends too early")

    def _malformed(self, problem: str) -> HttpError:
        return HttpError(
            400, f"the body is not what its content-encoding {self._coding!r} says: {problem}", code="invalid_encoding"
        )


def reader(content_encoding: bytes, bytes_max: int) -> Plain:
    """Return what reads a body of that `Content-Encoding`. Raises `HttpError` 415 for one that is not read."""
    match content_encoding.strip().lower():
        case b"" | b"identity":
            return Plain(bytes_max)
        case b"gzip" | b"x-gzip":
            return Compressed("gzip", bytes_max)
        case b"deflate":
            return Compressed("deflate", bytes_max)
        case other:
            known, named = ACCEPTED_CODINGS.decode(), other.decode("latin-1")
            problem = f"bodies are read as they are, or compressed by {known}, not with content-encoding {named!r}"
            raise HttpError(415, problem, code="unsupported_content_encoding")


def too_large(bytes_max: int) -> HttpError:
    """Return the refusal of a body that is larger."""
    return HttpError(413, f"the body is larger than {bytes_max} bytes", code="request_too_large")


def _kind(begun: bytes) -> int:
    """Return how a stream that begins so is read: a zlib stream's first two bytes are a method and a multiple of 31."""
    return _ZLIB if begun[0] & 0x0F == zlib.DEFLATED and (begun[0] << 8 | begun[1]) % 31 == 0 else _BARE
