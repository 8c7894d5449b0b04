"""The JSON records of the expert store: a manifest for each expert, and the versions of the sequence.

A record is *sealed* when it is written: the JSON holds a digest of the record and of its path in the store. A record
that was cut short, edited or moved to another path is recognized as corrupt when it is read.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from see_ray.errors import StoreError

FORMAT = 1
"""Version of the records' format; records of a later one are refused."""

NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,62}"

# No ".." or leading "/", which would write outside the cache; no "#", which obstore reserves.
_FILE_PATTERN = r"^(\.?[A-Za-z0-9_-][A-Za-z0-9_.-]*/)*\.?[A-Za-z0-9_-][A-Za-z0-9_.-]*$"

Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
Utc = Annotated[AwareDatetime, AfterValidator(lambda when: when.astimezone(UTC))]


class Record(BaseModel):
    """Base of the records: frozen, unknown fields refused."""

    # NaN is refused: it would become null in JSON, and the record unreadable.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ExpertRef(Record):
    """Identifies an expert by name and version, written `sa@2`."""

    name: Name
    version: int = Field(ge=1)

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"


class Manifest(Record):
    """What an expert is and how to apply it."""

    format: int = Field(default=FORMAT, ge=1)
    name: Name
    version: int = Field(ge=1)
    created_at: Utc
    task: str
    """The arriving task that it was fitted on."""
    base_model: str
    """Name of the base model, as configured."""
    fingerprint: str
    """SHA-256 of the base model, as hex digits; the same for all experts of one sequence."""
    form: Literal["activated", "full"]
    activation_tokens: int | None = Field(default=None, ge=1)
    """How many tokens at the end of the generation prompt the adapter applies to; None in the full form."""
    generation_prompt: tuple[int, ...]
    """Token ids of the generation prompt."""
    indicator_tokens: tuple[int, int]
    """The token ids of (accept, pass)."""
    threshold: float = Field(ge=0, le=1)
    """The expert accepts a query if P(accept) is at least this."""
    metrics: dict[str, float]
    """Figures of the calibration and the gate, by name."""
    gate: Literal["passed", "set aside", "forced"] = "passed"
    """`set aside`: it failed a limit of the gate and was not published; `forced`: published with `--force`."""
    gate_failed: tuple[str, ...] = ()
    """The limits that it failed, one sentence for each."""
    r: int = Field(ge=1)
    """LoRA rank."""
    files: dict[Annotated[str, Field(pattern=_FILE_PATTERN)], Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    """The expert's files: relative path to SHA-256 of the bytes."""

    @property
    def ref(self) -> ExpertRef:
        return ExpertRef(name=self.name, version=self.version)

    @property
    def id(self) -> str:
        return self.ref.id

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        tokens, prompt = self.activation_tokens, len(self.generation_prompt)
        if (self.form == "full") != (tokens is None) or (tokens or 0) > prompt:
            raise ValueError(f"{tokens} activation_tokens of {prompt} do not fit the {self.form} form")
        return self


class ExpertSequence(Record):
    """One version of the ordered list of live experts."""

    format: int = Field(default=FORMAT, ge=1)
    version: int = Field(ge=0)
    """0 is the empty sequence of a store in which nothing was published yet."""
    created_at: Utc
    """Never earlier than that of the version before, even if the publishers' clocks differ."""
    experts: tuple[ExpertRef, ...]
    """Oldest first; at most one of each name."""
    change: str
    """What made this version: `publish sa@1`, `remove sa@1`, `roll back to 3`."""
    forced: bool = False
    """Published although it failed the gate, because the operator asked for it."""

    def newest_first(self) -> tuple[ExpertRef, ...]:
        """The experts in the order in which a chain asks them."""
        return self.experts[::-1]


EMPTY_SEQUENCE = ExpertSequence(
    version=0, created_at=datetime(1970, 1, 1, tzinfo=UTC), experts=(), change="nothing published yet"
)

_Sealed = TypeVar("_Sealed", Manifest, ExpertSequence)


def digest(body: object) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def seal(record: Record, path: str) -> bytes:
    """A record as JSON, with a digest of itself and of the path that it is written to."""
    body = record.model_dump(mode="json")
    return (json.dumps({**body, "sha256": digest([path, body])}, indent=1) + "\n").encode()


def unseal(kind: type[_Sealed], data: bytes, path: str, url: str) -> _Sealed:
    """The record that `seal` wrote at `path` of the store at `url`.

    Raises:
        StoreError: it is corrupt, or of a later format.
    """
    try:
        body = json.loads(data)
        if body["format"] > FORMAT:  # first: a later format may be sealed in another way
            raise StoreError(f"{url}/{path} has format {body['format']}, this see_ray reads {FORMAT}: upgrade see_ray")
        if body.pop("sha256") != digest([path, body]):
            raise ValueError("it was edited or moved after it was written")
        return kind.model_validate_json(json.dumps(body))
    except (ValueError, TypeError, KeyError) as error:
        why = describe(error) if isinstance(error, ValidationError) else str(error)
        raise StoreError(f"{url}/{path} is corrupt ({len(data)} bytes: {why}); restore it from a backup") from error


def describe(error: ValidationError) -> str:
    """The invalid fields of a record, on one line."""
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'record'}: {item['msg']}" for item in error.errors())
