"""Encoders of every family, of both libraries: the same network, whatever its precision and order of memory."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import CLASSES, library_logits, make_image, run, spread_logits

from models.architectures import architecture, build, card_for, least_canvas
from models.folding import fold_batch_norms
from models.segmenter import Segmenter

#: One of each kind of block that is not in the others: they cost a second each.
QUICK = ("densenet121", "mit_b0", "tu-convnext_atto", "tu-lambda_resnet26t")
#: One of each family.
FAMILIES = (
    "resnet18", "efficientnet-b0", "resnext50_32x4d", "dpn68", "vgg11", "vgg11_bn", "se_resnet50", "inceptionv4",
    "inceptionresnetv2", "mobilenet_v2", "mobileone_s0", "xception", "timm-efficientnet-b0",
    "timm-tf_efficientnet_lite0", "timm-skresnet18", "tu-convnextv2_atto", "tu-regnety_002", "tu-resnetv2_50",
    "tu-resnest14d", "tu-res2net50_26w_4s", "tu-gernet_s", "tu-repvgg_a0", "tu-ghostnet_100",
    "tu-mobilenetv3_small_050", "tu-mobilenetv4_conv_small_035", "tu-efficientvit_b0", "tu-mobilevit_xxs",
    "tu-mobilevitv2_050", "tu-pvt_v2_b0", "tu-edgenext_xx_small", "tu-fastvit_t8", "tu-dla34", "tu-rexnet_100",
    "tu-selecsls42", "tu-poolformer_s12", "tu-caformer_s18", "tu-efficientformer_l1", "tu-starnet_s1",
    "tu-repghostnet_050", "tu-inception_next_atto", "tu-cspresnet50", "tu-darknet53", "tu-nf_regnet_b0",
    "tu-eca_nfnet_l0", "tu-tresnet_m", "tu-vovnet39a", "tu-ese_vovnet19b_dw", "tu-tinynet_e", "tu-mnasnet_small",
    "tu-fbnetc_100", "tu-hardcorenas_a", "tu-lcnet_050", "tu-twins_pcpvt_small", "tu-mambaout_femto",
    "tu-tiny_vit_5m_224", "tu-repvit_m0_9", "tu-focalnet_tiny_srf", "tu-hgnet_tiny", "tu-hgnetv2_b0",
    "tu-skresnet18", "tu-swiftformer_xs", "tu-mixnet_s", "tu-gcresnext26ts",
)  # fmt: skip
#: Those that take one size only.
OF_ONE_SIZE = {
    "tu-swin_tiny_patch4_window7_224": 224, "tu-maxvit_rmlp_pico_rw_256": 256, "tu-coatnet_pico_rw_224": 224,
    "tu-efficientformerv2_s0": 224,
}  # fmt: skip
#: Those that need all their stages.
DEEP = frozenset({"tu-hrnet_w18_small"})


pytestmark = pytest.mark.usefixtures("one_thread")


def settled(network: Any, images: list[np.ndarray]) -> None:
    """Norms take the statistics of these images, so that signals neither fade nor blow up; classes are far apart."""
    for part in network.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.momentum = 1.0
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 64 - 2
    with torch.no_grad():
        network.train()(pixels)
        spread_logits(network.eval(), architecture("unet").logits_layers(network)[0], pixels, 4.0)


@pytest.mark.parametrize(
    "encoder",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in (*FAMILIES, *OF_ONE_SIZE, *DEEP))],
)
def test_an_encoder_answers_as_in_its_library(encoder: str) -> None:
    side_px = OF_ONE_SIZE.get(encoder, 64)
    depth = 5 if encoder in DEEP else 4
    fields: dict[str, Any] = {}
    if encoder in OF_ONE_SIZE:
        fields["size_policy"] = {"kind": "letterbox", "height_px": side_px, "width_px": side_px}
    args = {"encoder": encoder, "encoder_depth": depth, "decoder_channels": [32, 16, 16, 8, 8][:depth]}
    card = card_for("m", "unet", args, class_names=CLASSES, preprocessing={"normalization": "imagenet"}, **fields)
    torch.manual_seed(0)
    network: Any = build(card)
    images = [make_image(side_px, side_px, seed) for seed in (1, 2, 3, 4)]
    settled(network, images)
    expected = np.stack([library_logits(network, image).argmax(dim=0).numpy() for image in images])
    assert len(np.unique(expected)) == len(CLASSES)
    pixels = images[0]
    logits_CHW = library_logits(network, pixels)

    def error(other_CHW: torch.Tensor) -> float:
        return float((other_CHW.float() - logits_CHW).square().mean().sqrt() / logits_CHW.std())

    segmenter = Segmenter(copy.deepcopy(network), card, device="cpu", precision="fp32")
    assert np.mean(np.stack([run(segmenter, [image])[0].class_ids for image in images]) == expected) >= 0.9999
    folded = copy.deepcopy(network)
    assert fold_batch_norms(folded, (1, 3, *least_canvas(card))) > 0
    assert error(library_logits(folded, pixels)) < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        usual = error(library_logits(network, pixels))
    logits: list[torch.Tensor] = []
    segmenter = Segmenter(network, card, device="cpu", precision="bf16")
    segmenter._module.register_forward_hook(lambda part, inputs, output: logits.append(output[0]))
    run(segmenter, [pixels])
    print(f"{encoder}: {error(logits[0]):.4f} in bf16, autocast {usual:.4f}")
    # What is left is rounding, as in torch's own mixed precision: by chance a little more or less.
    assert error(logits[0]) < 1.5 * usual + 0.01
