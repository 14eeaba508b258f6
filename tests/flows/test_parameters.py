"""A flow's parameters are the fields of its configuration, one by one."""

from __future__ import annotations

import pytest

pytest.importorskip("prefect")

from prefect.exceptions import ParameterTypeError

from flows.driving import Place
from flows.parameters import refuse_secrets
from flows.segment_corpus import segment_corpus
from pipeline.config import SegmentConfig
from pipeline.errors import UsageError


def test_the_form_has_every_field_with_its_bounds_default_and_description() -> None:
    ours = SegmentConfig.model_json_schema()
    form = segment_corpus.parameters.model_dump()
    assert list(form["properties"]) == [*SegmentConfig.model_fields, *Place.model_fields]
    assert form["required"] == ours["required"] == ["source", "dest", "model"]
    for name, field in ours["properties"].items():
        shown = dict(form["properties"][name])
        assert shown.pop("title") == name and shown.pop("position") is not None
        field.pop("title", None)
        if "$ref" in field:  # the two schemas keep their definitions in different places
            shown["$ref"] = shown["$ref"].replace("#/definitions/", "#/$defs/")
        if name != "settings":  # JSON of any kind
            assert shown == field, name


def test_parameters_are_cast_and_checked_like_the_configuration() -> None:
    given = {"source": "a", "dest": "b", "model": "c", "batch_size": "4", "suffixes": [".x"], "drift": {"runs": "3"}}
    cast = segment_corpus.validate_parameters(given | {"ray_jobs_address": "http://head:8265"})
    assert cast.pop("ray_jobs_address") == "http://head:8265"
    assert SegmentConfig(**cast) == SegmentConfig(**given)
    with pytest.raises(ParameterTypeError, match="run_date"):
        segment_corpus.validate_parameters(given | {"run_date": "tomorrow"})
    with pytest.raises(ParameterTypeError, match="threads: Input should be less than or equal to 1024"):
        segment_corpus.validate_parameters(given | {"threads": 100_000})


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "https://me:word@host/list.txt"},
        {"model": "https://host/m.safetensors?X-Amz-Signature=abc"},
        {"dest": "sftp://me:word@host/masks"},
        {"registry": "https://host/models?sv=1&sig=abc"},
        {"source": "s3://KEY:word@b/photos"},
        {"source": "zip://a.jpg::https://me:word@host/x.zip?sig=abc"},
    ],
)
def test_no_secret_is_a_parameter(changes: dict[str, str]) -> None:
    given = {"source": "s3://b/photos", "dest": "s3://b/masks", "model": "m"} | changes
    (name,) = changes
    with pytest.raises(UsageError, match=f"{name} is .* make that one invalid") as refused:
        segment_corpus.fn(**given)
    assert "word" not in str(refused.value).partition("with a password")[0] and "abc" not in str(refused.value)
    with pytest.raises(UsageError, match=f"segmentation.{name} is"):
        refuse_secrets({"segmentation": SegmentConfig(**given)})
