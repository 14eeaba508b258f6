"""A flow's parameters, made from pydantic models. Owns: the signature that Prefect turns into a form and a schema, and
that no secret is among them. Must not know: what the parameters mean.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel

from pipeline.errors import UsageError
from pipeline.storage import holds_secret, without_secrets

_F = TypeVar("_F", bound=Callable[..., Any])


def with_fields_of(*models: type[BaseModel]) -> Callable[[_F], _F]:
    """Gives a function of `**settings` one keyword parameter for each field of `models`: with its type, its bounds,
    its default and its description.

    Flat, not one parameter that is the model: so `-p source=…` works, and the server names the very field it refuses.
    Called with an address that holds a secret, the function raises UsageError: see `refuse_secrets`.
    """

    fields = {name: field for model in models for name, field in model.model_fields.items()}

    def decorate(function: _F) -> _F:
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else field.get_default(),
                annotation=Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation,
            )
            for name, field in fields.items()
        ]
        # Prefect takes descriptions from the docstring alone.
        lines = [f"    {name}: {field.description}" for name, field in fields.items() if field.description]

        @functools.wraps(function)
        def careful(**settings: Any) -> Any:
            refuse_secrets(settings)
            return function(**settings)

        careful.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Args:", *lines])
        careful.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return careful  # type: ignore[return-value]

    return decorate


def refuse_secrets(parameters: Mapping[str, Any]) -> None:
    """Raises UsageError for an address with a password or a signature: Prefect keeps what a flow is given, and shows it
    to everybody who sees the run.
    """
    for name, value in parameters.items():
        if isinstance(value, BaseModel):
            refuse_secrets({f"{name}.{field}": getattr(value, field) for field in type(value).model_fields})
        elif isinstance(value, str) and holds_secret(value):
            raise UsageError(
                f"{name} is {without_secrets(value)!r} with a password or a signature in it, which Prefect has kept "
                "and shows: make that one invalid. Credentials come from the environment, profiles or fsspec's "
                "configuration files; signed addresses may stand in a manifest that SOURCE names"
            )
