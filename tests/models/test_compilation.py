from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from small_networks import distinct_network, make_image, run, small_card

from models.compilation import CompiledNetwork
from models.segmenter import Segmenter


def test_without_a_compiler_it_warns_once_and_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: object) -> None:
        raise torch._inductor.exc.InvalidCxxCompiler

    import torch._inductor.exc

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiler(network, backend=no_compiler))
    network = torch.nn.Conv2d(3, 2, 1)
    compiled = CompiledNetwork(network)
    images = torch.ones(1, 3, 4, 4)
    with caplog.at_level(logging.WARNING, "models.compilation"), torch.inference_mode():
        assert torch.equal(compiled(images), network(images))
        assert torch.equal(compiled(images), network(images))
    assert caplog.text.count("running without it") == 1


def test_what_the_network_itself_raises_is_not_swallowed() -> None:
    compiled = CompiledNetwork(torch.nn.Conv2d(3, 2, 1))
    compiled._compiled = compiled._network
    with pytest.raises(RuntimeError, match="channels"):
        compiled(torch.ones(1, 5, 4, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"), [("unet", "bf16"), ("fcn_resnet50", "fp32"), ("maskrcnn_mobilenet_v3_large_fpn", "fp32")]
)
def test_compiled_networks_agree_with_eager_ones(name: str, precision: str, caplog: pytest.LogCaptureFixture) -> None:
    card = small_card(name)
    pixels = make_image(64, 64, seed=1)
    answers = []
    for compile_it in (False, True):
        segmenter = Segmenter(distinct_network(card), card, device="cpu", precision=precision, compile=compile_it)
        prediction = run(segmenter, [pixels, None])[0]
        answers.append(segmenter.postprocess(prediction)[0])
    assert "running without it" not in caplog.text or os.system("c++ --version >/dev/null 2>&1")
    assert np.mean(answers[0] == answers[1]) >= (0.999 if precision == "fp32" else 0.98)
