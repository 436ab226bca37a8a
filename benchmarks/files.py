"""Files at the edge of this package: strict schemas, and complaints that fit on one line."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """A schema that refuses unknown keys. NaN and infinity travel as strings, for JSON has no words for them."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


def complaint(error: ValidationError) -> str:
    """The first thing that is wrong, on one line: where, what, and how many more."""
    errors = error.errors(include_url=False)
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"])
    unknown = first["type"] in ("extra_forbidden", "unexpected_keyword_argument")
    what = "this key is not known" if unknown else first["msg"].removeprefix("Value error, ")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where}: {what}{more}" if where else f"{what}{more}"
