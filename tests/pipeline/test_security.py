"""What SECURITY.md promises: no file makes the program run code or write elsewhere, no text steers a terminal, and no
secret stays behind.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from command_line import Maskmill
from handmade import make_image, part_paths, rows_of
from safetensors.torch import load, save

import flows
import models
import pipeline
from models.file import CARD_KEY, read_card
from pipeline.errors import MaskmillError, ModelError, UsageError
from pipeline.learning.labels.source import open_labels
from pipeline.registry import push_model, resolve

COMMON = ("--precision", "fp32", "--threads", "1", "--no-report")


# ── no code in data ──────────────────────────────────────────────────────────────────────────────────────────────────


class Malicious:
    """As a pickle: makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[tuple[bytes, Path]]:
    """A pickle, and the file that must not be there at the end."""
    ran = tmp_path / "ran"
    data = pickle.dumps(Malicious(ran), protocol=2)
    pickle.loads(data)
    assert ran.exists(), "the pickle would not have done anything anyway"
    ran.unlink()
    yield data, ran
    assert not ran.exists(), "a pickle was loaded"


def test_a_pickle_by_any_name_is_not_loaded(
    trap: tuple[bytes, Path], tmp_path: Path, image_folder: Callable[..., Path], maskmill: Maskmill
) -> None:
    data, _ = trap
    photos, registry = image_folder(2), tmp_path / "registry"
    (registry / "street" / "_history").mkdir(parents=True)
    version = hashlib.sha256(data).hexdigest()[:12]
    names = [tmp_path / name for name in ("m.safetensors", "m.pth", "m.pkl")]
    for path in (*names, registry / "street" / f"{version}.safetensors"):
        path.write_bytes(data)
    from_registry = ("--registry", registry)
    commands = [
        *(("segment", photos, tmp_path / "out", "--model", path, *COMMON) for path in names),
        ("segment", photos, tmp_path / "out", "--model", f"street@{version}", *from_registry, *COMMON),
        *(("models", "push", path, *from_registry) for path in names),
        *(("models", "import", "torchvision:fcn_resnet50", "--weights-file", path, "--out", tmp_path / "x.safetensors")
          for path in names),
        *(("train", photos, "--name", "t", "--init", path, *from_registry) for path in names[:1]),
        *(("evaluate", photos, "--model", path) for path in names[:1]),
    ]  # fmt: skip
    for command in commands:
        said = maskmill(*command)
        assert said.status == 2 and said.err.count("\n") <= 3, (command, said)
    (registry / "street" / "_history" / "00000001.json").write_bytes(data)
    for command in (("models", "history", "street"), ("models", "show", "street"), ("models", "list")):
        assert maskmill(*command, *from_registry).status == 2, command
    assert not (tmp_path / "out").exists() and not (tmp_path / "x.safetensors").exists()


def test_the_source_unpickles_tensors_only() -> None:
    """`crew` pickles an error of its own, to see whether it travels."""
    found = []
    for package in (models, pipeline, flows):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name = ast.unparse(node.func)
                if name.endswith(("pickle.load", "pickle.loads", "Unpickler", "joblib.load", "yaml.load")) or name in (
                    "eval", "exec", "__import__", "os.system", "np.load", "numpy.load",
                ):  # fmt: skip
                    found.append(f"{path.name}: {ast.unparse(node)}")
                if name.endswith(("torch.load", "get_state_dict")):
                    options = {key.arg: ast.unparse(key.value) for key in node.keywords}
                    assert options.get("weights_only") == "True", f"{path}: {ast.unparse(node)}"
    assert found == ["crew.py: pickle.loads(pickle.dumps(error))"]


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────

STEERING = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m\r"
NAMES = [
    "..", "../../secret.png", "/etc/passwd", "..\\..\\secret.png", "%2e%2e%2fsecret.png", "a%00b.png", "nul\0byte.png",
    "=cmd|' /C calc'!A0.png", "<script>alert(1)</script>.png", "'; DROP TABLE segments; --.png", f"{STEERING}.png",
    "${jndi:ldap://x}.png", "file:///etc/passwd", "a/../../../../b.png",
]  # fmt: skip


def test_a_manifest_of_hostile_names_writes_nowhere_else(
    tmp_path: Path, semantic_model: Path, maskmill: Maskmill
) -> None:
    """Each is one row under its own name, as it was written: nothing is decoded, and no name becomes a path."""
    home = tmp_path / "home"
    make_image(home / "lists" / "good.png", 1)
    listed = [*NAMES, "good.png"]
    (home / "lists" / "list.jsonl").write_text("".join(json.dumps({"uri": name}) + "\n" for name in listed))
    before = {path for path in tmp_path.rglob("*")}
    said = maskmill(
        "segment", home / "lists" / "list.jsonl", home / "out", "--model", semantic_model, *COMMON,
        "--max-error-rate", "1",
    )  # fmt: skip
    assert said.status == 0, said
    rows = rows_of(home / "out")
    ok = [row["image_uri"] for row in rows if row["status"] == "ok"]
    assert ok == [f"file://{home}/lists/good.png"] and len(rows) == len(set(row["image_uri"] for row in rows))
    assert {row["error_kind"] for row in rows if row["status"] != "ok"} <= {"missing", "not_an_image", "denied"}
    for kind in ("coco", "png", "yolo", "hf", "labelstudio", "overlay"):
        assert maskmill("export", home / "out", "--format", kind, "--out", home / "exports" / kind).status == 0
    new = {path.relative_to(home).parts[0] for path in tmp_path.rglob("*") if path not in before}
    assert new == {"out", "exports"}


def test_an_export_of_images_with_hostile_names_stays_below_its_folder(
    tmp_path: Path, semantic_model: Path, maskmill: Maskmill
) -> None:
    photos = tmp_path / "photos"
    on_disk = [f"a{name}.png" for name in NAMES if not {"/", "\0"} & set(name)]
    for number, name in enumerate(on_disk):
        make_image(photos / "x.png", number).rename(photos / name)
    said = maskmill("segment", photos, tmp_path / "out", "--model", semantic_model, *COMMON, "--suffix", ".png")
    assert said.status == 0 and len(rows_of(tmp_path / "out")) == len(on_disk)
    before = {path for path in tmp_path.rglob("*")}
    for kind in ("png", "coco", "labelstudio"):
        said = maskmill("export", tmp_path / "out", "--format", kind, "--out", tmp_path / "ex" / kind, "--images")
        assert said.status == 0, said
    written = [path for path in tmp_path.rglob("*") if path not in before and path.is_file()]
    assert all(path.is_relative_to(tmp_path / "ex") and path.name.isascii() for path in written)
    assert sum(path.parent.name == "images" for path in written) == 3 * len(on_disk)


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "..", "nul\0.png", "/../secret.png"])
def test_labels_name_no_image_outside_their_data_set(tmp_path: Path, name: str) -> None:
    make_image(tmp_path / "secret.png", 1)
    (tmp_path / "set" / "images").mkdir(parents=True)
    body = {
        "categories": [{"id": 1, "name": "cell"}],
        "images": [{"id": 1, "file_name": name, "height": 32, "width": 40}],
        "annotations": [],
    }
    (tmp_path / "set" / "annotations.json").write_text(json.dumps(body))
    with pytest.raises(UsageError, match="file_name"):
        open_labels(tmp_path / "set")


@pytest.mark.parametrize(
    "reference", ["../street", "street/../../x", "..@champion", "street@../../x", "a\0b", "street@"]
)
def test_a_model_reference_leads_nowhere_but_to_a_file_of_weights(tmp_path: Path, reference: str) -> None:
    with pytest.raises(ModelError):
        resolve(reference, registry=str(tmp_path))


def test_no_name_steers_a_terminal(
    tmp_path: Path, semantic_model: Path, image_folder: Callable[..., Path], maskmill: Maskmill
) -> None:
    """Names of images, folders, classes, aliases, reasons: through every command that shows them."""
    data = semantic_model.read_bytes()
    card = read_card(data)
    classes = tuple(one.model_copy(update={"name": one.name + STEERING}) for one in card.classes)
    hostile = card.model_copy(update={"classes": classes, "provenance": {"by": STEERING}})
    model = tmp_path / "hostile.safetensors"
    model.write_bytes(save(load(data), metadata={CARD_KEY: hostile.model_dump_json()}))
    photos = image_folder(3, name=f"photos{STEERING}")
    make_image(photos / f"a{STEERING}.png", 7)
    (photos / f"b{STEERING}.png").write_bytes(b"no picture")
    out, registry = tmp_path / f"out{STEERING}", tmp_path / "registry"
    shown = []

    def show(status: int, *command: Any) -> None:
        said = maskmill(*command)
        assert said.status == status, (command, said)
        text = said.out + said.err
        wild = [c for c in text if c != "\n" and not c.isprintable()]
        assert not wild, (command, wild, text)
        shown.append(text)

    show(3, "segment", photos, out, "--model", model, *COMMON)
    show(2, "segment", photos / "nothing", out, "--model", model, *COMMON)
    show(0, "models", "push", model, "--registry", registry, "--reason", STEERING)
    history = registry / card.name / "_history"
    entry = json.loads((history / "00000001.json").read_text())
    entry |= {"number": 2, "by": STEERING, "aliases": entry["aliases"] | {f"a{STEERING}": entry["version"]},
              "version": STEERING}  # fmt: skip
    (history / "00000002.json").write_text(json.dumps(entry))
    sql = "SELECT i.image_uri, c.name FROM images i, classes c"
    for status, *command in (
        (0, "models", "list", "--registry", registry), (0, "models", "history", card.name, "--registry", registry),
        (0, "models", "show", model), (0, "runs", "list", out),
        (0, "query", out, sql), (0, "query", out, f"SELECT '{STEERING}' x"), (2, "query", out, f'SELECT "{STEERING}"'),
        (0, "verify", out, "--deep"), (0, "drift", out), (0, "sheet", out, "--out", tmp_path / f"s{STEERING}.png"),
        (0, "report", out, "--out", tmp_path / f"{STEERING}.html"),
        (0, "export", out, "--format", "coco", "--out", tmp_path / f"e{STEERING}"),
        (0, "forget", out, "--where", "image_uri LIKE '%owned%'"), (2, "forget", out, "--where", f'"{STEERING}"'),
        (0, "prune", out, "--keep-versions", "1"),
        (2, "evaluate", photos, "--model", model), (2, "labels", "check", photos),
        (2, "models", "alias", f"{card.name}@challenger", f"x{STEERING}", "--registry", registry),
        (2, "models", "show", f"x{STEERING}", "--registry", registry),
        (2, "segment", photos, out, "--model", model, "--set", f"{STEERING}=1"),
        (2, "runs", "show", out, f"x{STEERING}"), (2, "runs", "abandon", out, f"x{STEERING}"),
    ):  # fmt: skip
        show(status, *command)
    assert sum("owned" in text for text in shown) > len(shown) // 2
    assert len(rows_of(out)) == 5, "without --yes nothing is forgotten or pruned"


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SECRET = "Sup3rS3cretThing"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and a web server that shows it to everybody, whatever they sign with, but for what is denied."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def send_head(self) -> Any:
            return self.send_error(403) if "denied" in self.path else super().send_head()

    folder = tmp_path / "web"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"127.0.0.1:{server.server_port}"
        server.shutdown()


def everything_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file as it is, and what is compressed in Parquet as text besides; names of files too."""
    for path in folder.rglob("*"):
        yield str(path), path.name.encode()
        if path.is_file():
            data = path.read_bytes()
            yield str(path), data
            if path.suffix == ".parquet":
                yield str(path), str(pq.read_table(io.BytesIO(data)).to_pylist()).encode()


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment full of secrets, that tells all in its logs; gives its folder for scratch."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "PREFECT_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    return scratch


def test_no_secret_stays_behind(
    tmp_path: Path, web: tuple[Path, str], semantic_model: Path, maskmill: Maskmill, keys: Path
) -> None:
    """Keys in the environment, passwords and signatures in addresses of images, lists and models, right and wrong."""
    folder, host = web
    for number in range(3):
        make_image(folder / f"{number}.png", number)
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "m.safetensors").write_bytes(semantic_model.read_bytes())
    (folder / "bad.safetensors").write_bytes(b"nothing")
    signed = f"X-Amz-Credential={SECRET}&X-Amz-Expires=60&X-Amz-Signature={SECRET}&X-Amz-Security-Token={SECRET}"
    azure, userinfo = f"sv=2025&sr=b&sp=r&se=1&sig={SECRET}", f"me:{SECRET}@"
    lines = [
        f"http://{host}/0.png?{signed}", f"http://{userinfo}{host}/1.png", f"http://{host}/2.png?{azure}",
        f"http://{host}/bad.png?{signed}", f"http://{host}/gone.png?{signed}", f"http://{userinfo}{host}/gone2.png",
        f"http://127.0.0.1:1/dead.png?{signed}", f"zip://a.png::http://{userinfo}{host}/x.zip?{signed}",
        f"simplecache::http://{userinfo}{host}/0.png", f"http://{host}/it's denied.png?{signed}",
        f"http://{host}/denied/http://{userinfo}{host}/0.png", f"cached://http://me:p/{SECRET}@{host}/0.png",
    ]  # fmt: skip
    (folder / "list.txt").write_text("\n".join(lines))
    model, registry = f"http://{host}/m.safetensors?{signed}", tmp_path / "registry"
    dest = tmp_path / "out"
    report = tuple(part for part in COMMON if part != "--no-report")
    commands: list[tuple[Any, ...]] = [
        ("segment", f"http://{host}/list.txt?{signed}", dest, "--model", model, *report, "--max-error-rate", "1"),
        ("segment", f"http://{userinfo}{host}/list.txt", dest, "--model", model, *report, "--max-error-rate", "1"),
        ("segment", f"http://{host}/0.png?{signed}", dest, "--model", model, *report, "--dry-run"),
        ("segment", f"http://{host}/none.txt?{signed}", dest, "--model", model, *report),
        ("segment", f"http://{host}/list.txt?{signed}", dest, "--model", f"http://{host}/x.safetensors?{signed}"),
        ("segment", f"http://{host}/list.txt?{signed}", dest, "--model", f"http://{host}/bad.safetensors?{signed}"),
        ("models", "show", model), ("models", "push", model, "--registry", registry),
        ("models", "push", f"http://{host}/bad.safetensors?{signed}", "--registry", registry),
        ("models", "list", "--registry", f"http://{userinfo}{host}/registry?{signed}"),
        ("limits", f"http://{userinfo}{host}/list.txt?{signed}", "--model", model, "--seconds", "0.05", "--out",
         tmp_path / "limits.json"),
        ("runs", "list", dest), ("query", dest, "SELECT * FROM segments"), ("verify", dest, "--deep"),
        ("report", dest, "--out", tmp_path / "page.html"), ("sheet", dest, "--out", tmp_path / "sheet.png"),
        ("export", dest, "--format", "png", "--out", tmp_path / "export", "--images"),
        ("evaluate", f"http://{host}/set?{signed}", "--model", model),
        ("labels", "check", f"http://{userinfo}{host}/set?{signed}"),
        ("train", f"http://{host}/set?{signed}", "--name", "t", "--init", model, "--registry", registry),
        ("report", dest, "--out", f"memory://{userinfo}h/page.html"),
        ("report", dest, "--out", f"memory://{userinfo}h/page.html", "--json"),
        ("export", dest, "--format", "coco", "--out", f"memory://{userinfo}h/export"),
        ("segment", f"zip://a.png::http://{userinfo}{host}/x.zip?{signed}", dest, "--model", model, *report),
        ("segment", f"simplecache::http://{userinfo}{host}/0.png?{signed}", dest, "--model", model, *report),
        ("runs", "list", f"zip://out::sftp://{userinfo}127.0.0.1:1/x.zip"),
    ]  # fmt: skip
    statuses = []
    for command in commands:
        said = maskmill(*command)
        statuses.append(said.status)
        assert SECRET not in said.out, (command, said.out)
        assert SECRET not in said.err, (command, said.err)
    assert statuses[:3] == statuses[-6:-3] == [0, 0, 0] and 0 not in statuses[-3:], statuses
    rows = rows_of(dest)
    assert {f"http://{host}/{n}.png" for n in range(2)} <= {row["image_uri"] for row in rows if row["status"] == "ok"}
    assert {row["error_kind"] for row in rows if row["status"] != "ok"} >= {
        "missing",
        "not_an_image",
        "fetch_failed",
        "denied",
    }
    assert part_paths(dest) and list(dest.glob("runs/*/report.html"))
    for place in (dest, registry, keys, tmp_path / "export", tmp_path / "page.html"):
        for name, data in everything_below(place) if place.is_dir() else [(str(place), place.read_bytes())]:
            assert SECRET.encode() not in data, name
    assert not list(keys.iterdir())


def test_credentials_before_a_bucket_are_refused(
    tmp_path: Path, maskmill: Maskmill, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    photos, dest, bad = image_folder(1), tmp_path / "out", f"s3://KEY:{SECRET}@b/a"
    for name in ("list.txt", "list.csv"):
        (tmp_path / name).write_text(f"uri\ns3://b/a@b.jpg\n{bad}.jpg\n")
    model = ("--model", "nuclei-unet", *COMMON)
    for command in (
        ("segment", bad, dest, *model), ("segment", photos, bad, *model), ("segment", photos, dest, "--model", bad),
        ("segment", tmp_path / "list.csv", dest, *model), ("segment", tmp_path / "list.txt", dest, *model),
        ("runs", "list", bad.replace("s3", "gs")), ("query", bad, "SELECT 1"), ("verify", bad),
        ("models", "list", "--registry", bad), ("export", dest, "--format", "coco", "--out", bad),
    ):  # fmt: skip
        said = maskmill(*command)
        assert said.status == 2 and "environment variables" in said.err, (command, said)
        assert SECRET not in said.out + said.err, (command, said)
    assert not dest.exists() or not list(dest.rglob("*.parquet"))


def test_not_even_a_traceback_tells_a_secret(web: tuple[Path, str]) -> None:
    """What libraries log and raise has whole addresses in it."""
    address = f"http://me:{SECRET}@{web[1]}/x.safetensors?X-Amz-Signature={SECRET}"
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "models", "show", address], env={**os.environ, "MASKMILL_DEBUG": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" in done.stderr and web[1] in done.stderr, done
    assert SECRET not in done.stderr + done.stdout, done.stderr


def test_an_error_of_any_store_says_no_secret(maskmill: Maskmill, tmp_path: Path) -> None:
    for uri in (f"ftp://me:{SECRET}@127.0.0.1:1/x", f"sftp://me:{SECRET}@127.0.0.1:1/x", f"nothing://me:{SECRET}@h/x"):
        said = maskmill("segment", uri, tmp_path / "out", "--model", "nuclei-unet")
        assert said.status in (1, 2) and SECRET not in said.out + said.err, said
        said = maskmill("runs", "list", uri)
        assert said.status in (1, 2) and SECRET not in said.out + said.err, said


def test_push_of_bytes_needs_no_address(semantic_model: Path, tmp_path: Path) -> None:
    assert push_model(semantic_model.read_bytes(), str(tmp_path)).new
    with pytest.raises(MaskmillError):
        push_model(b"\x80\x04.", str(tmp_path))
