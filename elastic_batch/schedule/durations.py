"""Lengths of training as users write them ("90ep", "5e6sp", "250e9tok", "0.6dur"), and what they are in samples."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from elastic_batch.errors import InvalidSetting

Unit = Literal["ep", "sp", "tok", "dur"]

_AMOUNT = r"(\d+(\.\d*)?|\.\d+)([eE][-+]?\d{1,2})?"
_RULE = "must be a number with a unit: ep (epochs), sp (samples), tok (tokens) or dur (part of the whole)"
_REMEDY = "Write, say, '90ep', '5e6sp', '250e9tok' or '0.6dur'"


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of training, or a point in it, in the unit in which the user thinks.

    As a pydantic field it is a string in files and in the JSON schema. Equal lengths in one unit are equal, however
    they were written.

    >>> Duration.parse("1.5ep").samples(num_samples=1437)
    2156
    >>> Duration.parse("250e9tok").samples(num_samples=10**9, tokens_per_sample=2048)
    122070313
    >>> str(Duration.parse("5000000sp")), Duration.parse("90.0 ep") == Duration.parse("90ep")
    ('5e6sp', True)
    """

    amount: Fraction
    unit: Unit

    @classmethod
    def parse(cls, text: str | Duration, field: str = "duration") -> Duration:
        """Read a duration; a zero needs no unit.

        Args:
            text: What the user wrote; a duration is passed through.
            field: The setting it belongs to, for the message.

        Raises:
            InvalidSetting: It is not a number of at least 0 with one of the units.
        """
        if isinstance(text, Duration):
            return text
        match = (
            re.fullmatch(rf"(?P<amount>{_AMOUNT})\s*(?P<unit>ep|sp|tok|dur|)", text.strip())
            if isinstance(text, str)
            else None
        )
        if match is None or (not match["unit"] and Fraction(match["amount"])):
            raise InvalidSetting(field, text, _RULE, _REMEDY)
        amount = Fraction(match["amount"])
        return cls(amount, match["unit"] or "sp")  # type: ignore[arg-type] # the pattern has only these

    def samples(
        self,
        *,
        num_samples: int,
        tokens_per_sample: int | None = None,
        total: int | None = None,
        field: str = "duration",
    ) -> int:
        """Convert to samples, exactly; a fraction of a sample counts as one.

        Args:
            num_samples: N, samples of the training set.
            tokens_per_sample: Needed by `tok`.
            total: Length of the whole job in samples; needed by `dur`.
            field: The setting it belongs to, for the message.

        Raises:
            InvalidSetting: What the unit needs is not known.
        """
        return math.ceil(self.exact_samples(num_samples, tokens_per_sample, total, field))

    def exact_samples(self, num_samples: int, tokens_per_sample: int | None, total: int | None, field: str) -> Fraction:
        """Convert as `samples` does, without rounding: what repeats with this period must not drift."""
        match self.unit:
            case "ep":
                return self.amount * num_samples
            case "sp":
                return self.amount
            case "tok":
                if tokens_per_sample is None:
                    raise InvalidSetting(field, str(self), "needs tokens_per_sample", "Set it, or use ep, sp or dur")
                return self.amount / tokens_per_sample
            case "dur":
                if total is None:
                    raise InvalidSetting(field, str(self), "must not be a part of itself", "Use ep, sp or tok")
                return self.amount * total

    def __str__(self) -> str:
        return f"{_shortest(self.amount)}{self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            _validate, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        pattern = rf"^\s*({_AMOUNT}\s*(ep|sp|tok|dur)|0)\s*$"
        return {"type": "string", "pattern": pattern, "examples": ["90ep", "5e6sp", "250e9tok", "0.6dur"]}


def _validate(value: Any) -> Duration:
    try:
        return Duration.parse("0" if value == 0 else value)
    except InvalidSetting as error:
        # The loader knows the field's full name and the value; it takes the rule from here.
        raise ValueError(f"{error.rule}. {error.remedy}") from error


def _shortest(amount: Fraction) -> str:
    """Write a decimal number exactly and as people do: 0.6, 90, 5e6, 250e9."""
    if amount.denominator > 1:
        digits = 0
        while (amount * 10**digits).denominator > 1:
            digits += 1
        scaled = str(int(amount * 10**digits)).rjust(digits + 1, "0")
        return f"{scaled[:-digits]}.{scaled[-digits:]}"
    zeros = (len(str(amount)) - len(str(amount).rstrip("0"))) // 3 * 3 if amount else 0
    return f"{amount // 10**zeros}e{zeros}" if zeros >= 6 else str(amount)
