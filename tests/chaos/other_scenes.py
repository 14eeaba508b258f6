"""What else changes a store, as commands to disturb: training, the registry, upkeep, exports, evaluations."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from chaos.segment_scene import files, terminal_rows
from harness import in_process

import pipeline
from models.file import load_module, model_version
from pipeline.errors import ModelError, UsageError
from pipeline.learning.configuration import TrainConfig
from pipeline.learning.training import train
from pipeline.registry import listings
from pipeline.storage import open_storage
from pipeline.table.catalog import files_below

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline" / "learning"))
from tiny_training import TINY


class TrainScene:
    """`maskmill train` into the registry FOLDER/models, with a checkpoint after each of two epochs."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset

    def act(self, folder_uri: str) -> object:
        return train(
            TrainConfig(dataset=self._dataset, registry=f"{folder_uri}/models", epochs=2, engine="local", **TINY)
        )

    def look(self, folder_uri: str) -> None:
        """Whatever is in the registry is whole."""
        storage = open_storage(folder_uri)
        for uri in files(storage, f"{folder_uri}/models/discs"):
            if uri.endswith(".safetensors"):
                data = storage.get(uri).data
                assert uri.endswith(f"/{model_version(data)}.safetensors")
                load_module(data)

    def end(self, folder_uri: str) -> object:
        self.look(folder_uri)
        storage, registry = open_storage(folder_uri), f"{folder_uri}/models"
        (line,) = [line for line in listings(registry=registry) if line.name == "discs"]
        assert line.aliases == ("challenger",)
        _, module = load_module(storage.get(f"{registry}/discs/{line.version}.safetensors").data)
        weights = hashlib.sha256()
        for name, tensor in sorted(module.state_dict().items()):
            weights.update(name.encode() + tensor.numpy().tobytes())
        losses = []
        for uri in files(storage, f"{registry}/_training"):
            assert "/checkpoint-" not in uri and "/best-" not in uri, f"{uri} is left behind"
            if uri.endswith(".parquet"):
                table = pq.read_table(pa.BufferReader(storage.get(uri).data))
                losses += [(row["epoch"], row["loss"], row["val_panoptic_quality"]) for row in table.to_pylist()]
        return weights.hexdigest(), losses


class RegistryScene:
    """Changes of the model `street` in the registry FOLDER/models."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = list(files)
        self.versions = [model_version(Path(path).read_bytes()) for path in files]

    def look(self, folder_uri: str) -> None:
        """The champion, if there is one, has its file, and all of the history can be read."""
        try:
            history = pipeline.model_history("street", f"{folder_uri}/models")
        except ModelError as error:
            assert "street" in str(error) or "cannot be read" in str(error)
            return
        assert [entry.number for entry in history] == list(range(1, len(history) + 1))
        there = {one.version for one in pipeline.models(f"{folder_uri}/models") if one.name == "street"}
        assert {to for entry in history for to in entry.aliases.values()} <= there

    def end(self, folder_uri: str) -> object:
        registry = f"{folder_uri}/models"
        storage = open_storage(registry)
        history = pipeline.model_history("street", registry)
        told = [
            (one.action, one.version, one.champion_before, sorted(one.aliases.items()), one.former_champions)
            for one in history
        ]
        there = {
            uri.removeprefix(registry): hashlib.sha256(storage.get(uri).data).hexdigest()
            for uri in files(storage, registry)
            if uri.endswith(".safetensors")
        }
        return told, there


class PushScene(RegistryScene):
    """The second version is pushed, after the first was made champion."""

    def __init__(self, files: Sequence[str], alias: str | None = "challenger") -> None:
        super().__init__(files)
        self._alias = alias

    def begin(self, folder_uri: str) -> None:
        registry = f"{folder_uri}/models"
        pipeline.push_model(self._files[0], registry)
        pipeline.promote_model(f"street@{self.versions[0]}", registry)

    def act(self, folder_uri: str) -> object:
        return pipeline.push_model(self._files[1], f"{folder_uri}/models", alias=self._alias)


class PromoteScene(RegistryScene):
    """The second version is made champion."""

    def begin(self, folder_uri: str) -> None:
        PushScene(self._files).begin(folder_uri)
        pipeline.push_model(self._files[1], f"{folder_uri}/models")

    def act(self, folder_uri: str) -> object:
        return pipeline.promote_model("street@" + self.versions[1], f"{folder_uri}/models", force=True, reason="a test")


class RollbackScene(RegistryScene):
    """The champion before becomes champion again. Whoever repeats a rollback looks first: twice goes further back."""

    def begin(self, folder_uri: str) -> None:
        scene = PromoteScene(self._files)
        scene.begin(folder_uri)
        scene.act(folder_uri)

    def act(self, folder_uri: str) -> object:
        registry = f"{folder_uri}/models"
        champions = [
            one.version for one in pipeline.models(registry) if one.name == "street" and "champion" in one.aliases
        ]
        if champions == [self.versions[0]]:
            return None
        assert champions == [self.versions[1]]
        return pipeline.rollback_model("street", registry)


class _TableScene:
    """A change of the table FOLDER/dest, which readers may use meanwhile."""

    #: What `verify` may find between a kill and the same command again.
    half_done: frozenset[str] = frozenset()

    def look(self, folder_uri: str) -> None:
        found = pipeline.verify(f"{folder_uri}/dest")
        assert {one.kind for one in found} <= self.half_done
        terminal_rows(f"{folder_uri}/dest")

    def end(self, folder_uri: str) -> object:
        dest = f"{folder_uri}/dest"
        assert pipeline.verify(dest, deep=True) == []
        shown = pipeline.connect(dest).sql("SELECT image_uri, version, mask_crc32 FROM images ORDER BY ALL").fetchall()
        lasting = [
            uri.removeprefix(dest)
            for uri in files(open_storage(dest), dest)
            if not any(part in uri for part in ("/_tmp/", "/_log/", "/_forgotten/"))
        ]
        return terminal_rows(dest), shown, lasting


class PruneScene(_TableScene):
    """Of two versions the older one goes."""

    half_done = frozenset({"half_pruned"})

    def act(self, folder_uri: str) -> object:
        return pipeline.prune(f"{folder_uri}/dest", keep_versions=1, yes=True)


class ForgetScene(_TableScene):
    """One image is forgotten, in every file that names it."""

    half_done = frozenset({"not_forgotten"})

    def act(self, folder_uri: str) -> object:
        return pipeline.forget(f"{folder_uri}/dest", "image_uri LIKE '%/a.png'", yes=True)

    def end(self, folder_uri: str) -> object:
        storage = open_storage(folder_uri)
        for uri in files(storage, f"{folder_uri}/dest"):
            if uri.endswith(".parquet"):
                rows = pq.read_table(pa.BufferReader(storage.get(uri).data)).to_pylist()
                assert "/a.png" not in str(rows), f"{uri} remembers it"
        return super().end(folder_uri)


class ExportScene:
    """The table `dest`, which is not changed, as files of a format, with its images."""

    def __init__(self, dest: str, format_: str = "png") -> None:
        self._dest = dest
        self._format = format_

    def act(self, folder_uri: str) -> object:
        return pipeline.export(
            dest=self._dest, out=f"{folder_uri}/out", format=self._format, piece_images=2,
            images=self._format != "overlay",
        )  # fmt: skip

    def look(self, folder_uri: str) -> None:
        pass

    def end(self, folder_uri: str) -> object:
        out = f"{folder_uri}/out"
        storage = open_storage(out)
        return [
            # Some formats name the copies of images by their URIs.
            (uri.removeprefix(out), hashlib.sha256(storage.get(uri).data.replace(out.encode(), b"OUT")).hexdigest())
            for uri in files_below(storage, out)
            if not uri.endswith("/export.json") and "/_tmp/" not in uri
        ], [uri.removeprefix(out) for uri in files_below(storage, out) if "/_export/" in uri]


class EvaluateScene(_TableScene):
    """A model is evaluated on a labelled data set, masks and all."""

    def __init__(self, dataset: str, model: str) -> None:
        self._settings: dict[str, Any] = {
            "dataset": dataset, "model": model, "renamed": {"object": "disc"}, "split": "all",
            "resamples": 20, "precision": "fp32", "batch_size": 2,
            "threads": 1, "shard_size": 3, "engine": "local", "lease_ttl_s": 0.4, "max_error_rate": 1.0,
        }  # fmt: skip

    def act(self, folder_uri: str) -> object:
        with in_process():
            found = pipeline.evaluate(dest=f"{folder_uri}/dest", **self._settings)
        assert found.state == "done"
        return found

    def look(self, folder_uri: str) -> None:
        try:
            super().look(folder_uri)
        except UsageError as error:  # nothing was written yet
            assert "holds no Maskmill table" in str(error)

    def end(self, folder_uri: str) -> object:
        dest = f"{folder_uri}/dest"
        assert pipeline.verify(dest, deep=True) == []
        # An image that could not be read is made again, and then evaluated again: the newest counts.
        rows = pipeline.connect(dest).sql(
            "SELECT * EXCLUDE (evaluation_id, evaluated_at, run_id, attempt, processed_at, listed_etag) "
            "FROM evaluations WHERE evaluation_id = (SELECT max_by(evaluation_id, evaluated_at) FROM evaluations) "
            "ORDER BY image_uri"
        )
        return terminal_rows(dest), str(rows.fetchall())
