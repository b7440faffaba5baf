"""Names of tasks as safe path components."""

import hashlib
import re
import unicodedata

MAX_SLUG = 64
_HASH_CHARS = 8


def slugify(name: str) -> str:
    """A path component of ``[a-z0-9-]`` for any display name; never empty, at most ``MAX_SLUG`` characters.

    Lowering the case and turning spaces and underscores into hyphens is taken to be harmless (``TaskStream``
    refuses the rare collision). Anything else that is lost (unicode, ``/``, ``..``, length) adds the first
    digits of the name's SHA-256, so two such names can't meet in one folder.
    """
    harmless = re.sub(r"[ _]", "-", name).lower()
    ascii_only = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")
    if slug == harmless and 0 < len(slug) <= MAX_SLUG:
        return slug
    # surrogatepass: a lone surrogate (from os.fsdecode) is a legal str that strict UTF-8 can't encode
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARS]
    head = slug[: MAX_SLUG - _HASH_CHARS - 1].strip("-") or "task"
    return f"{head}-{digest}"
