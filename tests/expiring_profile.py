"""An AWS profile whose process gives whatever access key a file names now."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

_PROCESS = """import json, sys
key = open(sys.argv[1]).read().strip()
print(json.dumps({"Version": 1, "AccessKeyId": key, "SecretAccessKey": "testtest", "SessionToken": "t"}))
"""


class ExpiringProfile:
    """The profile `lab` of the environment, at `endpoint`. Its access key is `old` until `renew` is called."""

    def __init__(self, folder: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._key = folder / "key"
        self._key.write_text("old")
        (folder / "give.py").write_text(_PROCESS)
        (folder / "config").write_text(
            f"[profile lab]\nregion = us-east-1\nendpoint_url = {endpoint}\n"
            f"credential_process = {sys.executable} {folder / 'give.py'} {self._key}\n"
        )
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_PROFILE", "lab")

    def renew(self) -> None:
        self._key.write_text("new")
