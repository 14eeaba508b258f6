from __future__ import annotations

import sys
from pathlib import Path

from pipeline.learning.configuration import run_key
from pipeline.learning.labels.splits import Splitting

sys.path.insert(0, str(Path(__file__).parent))
from tiny_training import tiny


def test_a_run_is_known_by_what_decides_its_weights() -> None:
    here = tiny(Path("data"), Path("models"))
    key = run_key(here, train="abc", val="def")
    elsewhere = {"workers": 2, "ray_address": "1.2.3.4:6379", "layout": "coco"}
    assert run_key(tiny(Path("moved"), Path("other"), **elsewhere), train="abc", val="def") == key
    assert run_key(here, train="abd", val="def") != key
    assert run_key(tiny(Path("data"), Path("models"), seed=2), train="abc", val="def") != key
    drawn = tiny(Path("data"), Path("models"), splitting=Splitting(seed=4))
    assert drawn.settings()["splitting"]["seed"] == 4
    # Who asks for neither has the key of before they could be asked for.
    assert not {"splitting", "labels_of"} & here.settings().keys()
