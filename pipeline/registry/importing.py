"""Model files out of published weights. Owns: where such a file is written, and what its failures become. Must not
know: how weights become a network (`models.importing`), registries.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import InfrastructureError, ModelError
from pipeline.registry.shelf import Model, read_model
from pipeline.storage import normalize_uri


def import_model(out: str | os.PathLike[str], **settings: Any) -> Model:
    """Makes a model file on this machine out of published weights, and gives it back.

    `settings` are the fields of `models.importing.ImportConfig`: `source="torchvision:fcn_resnet50"` fetches
    torchvision's own weights; `weights_file`, `seed` and `smp:...` are the other ways. The file appears whole or not at
    all; the same weights make the same file. Raises ModelError for what cannot be a model, InfrastructureError where
    weights cannot be fetched or the file cannot be written.
    """
    from models.file import save_model
    from models.importing import DownloadError, ImportConfig, import_model

    path = Path(out)
    if path.suffix != ".safetensors":
        raise ModelError(f"{path} must end in .safetensors: that is what the file will be")
    if not path.parent.is_dir():
        raise ModelError(f"{path} cannot be written: there is no folder {path.parent}")
    try:
        card, state_dict = import_model(ImportConfig(**settings))
        save_model(path, state_dict, card)
    except DownloadError as error:
        raise InfrastructureError(f"{error} (--weights-file)") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "value_error":
            raise ModelError(first["msg"].removeprefix("Value error, ")) from error
        raise ModelError(f"{where} is {first['input']!r}: {first['msg']}") from error
    except ValueError as error:
        raise ModelError(str(error)) from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ModelError(f"{error.filename} cannot be read: {error.strerror}") from error
    except OSError as error:
        raise InfrastructureError(f"{path} could not be made: {error}") from error
    return read_model(normalize_uri(str(path)))
