"""`Options`: what every section of the configuration is made of, the methods' own settings included."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Frozen settings; unknown keys, wrong types, NaN and infinity are refused (pydantic.ValidationError)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )
