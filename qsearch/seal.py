"""Seals: the mark by which this user's own bundles and packs are known.

A seal is the HMAC-SHA256 of a manifest's digest under a random key that only this user can read. A manifest lists the digest
of every file beside it, so that a valid seal says that this user's qsearch wrote them all.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import tempfile
from pathlib import Path

from qsearch.errors import UntrustedError

__all__ = ["SEAL", "is_own", "key_file", "require_own", "seal_of"]

SEAL = "seal"
_KEY_BYTES = 32
_DOMAIN = "qsearch seal 1"


def key_file() -> Path:
    """Where this user's key is kept: $XDG_STATE_HOME/qsearch/key."""
    given = os.environ.get("XDG_STATE_HOME", "")
    home = Path(given if os.path.isabs(given) else os.path.expanduser("~/.local/state"))
    return home / "qsearch" / "key"


def seal_of(kind: str, digest: str) -> str | None:
    """The seal of what this user has made; None where no key can be kept.

    Args:
        kind: bundle or pack.
        digest: Of its manifest.
    """
    try:
        return _seal(_own_key(), kind, digest)
    except (OSError, _BadKey):
        # What is made is whole without a seal; whoever runs it is told why it has none.
        return None


def is_own(kind: str, digest: str, seal: str) -> bool:
    """Whether this user has made what has this seal."""
    try:
        return hmac.compare_digest(_seal(_read_key(), kind, digest).encode(), seal.encode())
    except (OSError, _BadKey):
        return False


def require_own(what: str, kind: str, digest: str, seal: str, trust: bool) -> None:
    """Refuse to run what this user has not made.

    Args:
        what: Its path.
        kind: bundle or pack.
        digest: Of its manifest, which must have been checked.
        seal: As found; may be empty.
        trust: Whether the user said that it is to be run all the same.

    Raises:
        UntrustedError: It is somebody else's.
    """
    if trust or is_own(kind, digest, seal):
        return
    try:
        _read_key()
        reason = "its seal is not this user's" if seal else "it has no seal"
    except FileNotFoundError:
        reason = f"this user has no key, {key_file()}, that it could have been sealed with"
    except (OSError, _BadKey) as error:
        reason = f"the key {key_file()} cannot be used: {getattr(error, 'strerror', None) or error}"
    raise UntrustedError(
        f"{what} was not made by this user here ({reason}). The library of a {kind} is code, which runs with all your rights: "
        "if you trust who made it, --trust runs it"
    )


class _BadKey(Exception):
    """Why a key is of no use."""


def _seal(key: bytes, kind: str, digest: str) -> str:
    return hmac.new(key, f"{_DOMAIN}\n{kind}\n{digest}".encode(), hashlib.sha256).hexdigest()


def _own_key() -> bytes:
    """The key; made if there is none, by one process of several that want it at once."""
    path = key_file()
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".key-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(os.urandom(_KEY_BYTES))
            # Unlike a renamed file, a link takes nobody's place.
            os.link(scratch, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(scratch)
    return _read_key()


def _read_key() -> bytes:
    with key_file().open("rb") as file:
        state = os.fstat(file.fileno())
        if state.st_uid != os.geteuid() or stat.S_IMODE(state.st_mode) & 0o077:
            raise _BadKey("others can read it; remove it, and the next export makes another")
        key = file.read(_KEY_BYTES + 1)
    if len(key) != _KEY_BYTES:
        raise _BadKey("it is damaged; remove it, and the next export makes another")
    return key
