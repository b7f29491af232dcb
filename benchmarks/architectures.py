"""The published architectures that conversion is measured and tested on: models with BatchNorm of two libraries."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Of each family of timm 1.0.31 that has BatchNorm, the three smallest models of at most 32 million parameters.
TIMM = """
byoanet: halonet_h1 eca_botnext26ts_256 eca_halonext26ts
byobnet: mobileone_s1 mobileone_s0 mobileone_s2
convmixer: convmixer_768_32 convmixer_1024_20_ks9_p14
cpubone: cpubone_nano cpubone_t0 cpubone_s0
cspnet: cs3darknet_focus_s cs3darknet_s cs3darknet_focus_m
cspnext: cspnext_tiny cspnext_s cspnext_m
densenet: densenet121 densenetblur121d densenet169
dla: dla46x_c dla46_c dla60x_c
dpn: dpn48b dpn68 dpn68b
efficientformer: efficientformer_l1 efficientformer_l3
efficientformer_v2: efficientformerv2_s0 efficientformerv2_s1 efficientformerv2_s2
efficientnet: mobilenetv2_035 mobilenetv2_050 mnasnet_small
efficientvim: efficientvim_m1 efficientvim_m1_dist efficientvim_m2
efficientvit_mit: efficientvit_b0 efficientvit_b1 efficientvit_b2
efficientvit_msra: efficientvit_m0 efficientvit_m1 efficientvit_m2
fasternet: fasternet_t0 fasternet_t1 fasternet_t2
fastvit: fastvit_t8 fastvit_t12 fastvit_s12
ghostnet: ghostnet_050 ghostnetv3_050 ghostnet_100
hardcorenas: hardcorenas_b hardcorenas_a hardcorenas_c
hgnet: hgnetv2_b0 hgnetv2_b1 hgnetv2_b2
hrnet: hrnet_w18_small hrnet_w18_small_v2 hrnet_w18_ssld
iformer: iformer_t iformer_s iformer_m
inception_next: inception_next_atto inception_next_tiny
inception_v3: inception_v3
lcnetv2: lcnetv2_small lcnetv2_base lcnetv2_large
levit: levit_128s levit_conv_128s levit_128
lowformer: lowformer_b0 lowformer_b1 lowformer_e1
maxxvit: maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224
mobilenetv3: mobilenetv3_small_050 lcnet_035 lcnet_050
mobilevit: mobilevit_xxs mobilevitv2_050 mobilevit_xs
nextvit: nextvit_small
regnet: regnetx_002 regnety_002 regnety_004
repghost: repghostnet_050 repghostnet_058 repghostnet_080
repvit: repvit_m1 repvit_m0_9 repvit_m1_0
res2net: res2next50 res2net50_14w_8s res2net50_48w_2s
resnest: resnest14d resnest26d resnest50d_1s4x24d
resnet: resnet10t resnet14t resnet18
resnetv2: resnetv2_18 resnetv2_18d resnetv2_34
rexnet: rexnet_100 rexnetr_100 rexnet_130
selecsls: selecsls42 selecsls60
senet: legacy_seresnet18 legacy_seresnext26_32x4d legacy_seresnet34
shvit: shvit_s1 shvit_s2 shvit_s3
sknet: skresnet18 skresnet34 skresnet50
starnet: starnet_s050 starnet_s100 starnet_s150
swiftformer: swiftformer_xs swiftformer_s swiftformer_l1
tiny_vit: tiny_vit_5m_224 tiny_vit_11m_224 tiny_vit_21m_384
tresnet: tresnet_m
visformer: visformer_tiny
volo: volo_d1_224 volo_d1_384
vovnet: ese_vovnet19b_slim_dw ese_vovnet19b_slim ese_vovnet19b_dw
xception: legacy_xception
xception_aligned: xception41p xception41
xcit: xcit_nano_12_p8_224 xcit_nano_12_p8_384 xcit_nano_12_p16_224
"""

# Families of torchvision without BatchNorm, but for the VGGs whose names say so.
WITHOUT_BATCH_NORM = ("alexnet", "convnext", "squeezenet", "swin", "vgg", "vit")
TOO_LARGE = ("regnet_y_128gf",)  # 645 million parameters
SEGMENTATION = ("fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18")
SIDES = {"inception_v3": 299, "maxvit_t": 224}  # of torchvision's images where 64 is too small
OPTIONS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One published model.

    Args:
        name: as its library calls it.
        family: as its library groups it.
        library: "torchvision" or "timm".
    """

    name: str
    family: str
    library: str

    def build(self) -> nn.Module:
        """Build it with random weights."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.library == "timm":
                import timm

                model: nn.Module = timm.create_model(self.name)
            else:
                options = {"weights_backbone": None} if self.family == "segmentation" else OPTIONS.get(self.name, {})
                model = torchvision.models.get_model(self.name, weights=None, **options)
        return model

    @property
    def device(self) -> str:
        """Where it can be built without its weights: torchvision computes the widths of RegNets with tensors."""
        return "cpu" if self.library == "torchvision" and self.name.startswith("regnet") else "meta"

    def parameters(self) -> int:
        """Count its parameters."""
        if self.library == "torchvision":
            weights = torchvision.models.get_model_weights(self.name)
            return int(next(iter(weights)).meta["num_params"])
        with torch.device("meta"):
            return sum(p.numel() for p in self.build().parameters())

    def sides(self) -> tuple[int, ...]:
        """Return sides of images to try, the smallest first."""
        if self.library == "torchvision":
            return (32,) if self.family == "video" else (SIDES.get(self.name, 64),)
        import timm

        side = int(timm.get_pretrained_cfg(self.name, allow_unregistered=False).input_size[-1])
        return (*(s for s in (64, 128) if s < side), side)

    def images(self, side: int, count: int = 1, device: str = "cpu") -> Tensor:
        """Return random images."""
        shape = (count, 3, 4, side, side) if self.family == "video" else (count, 3, side, side)
        return torch.randn(shape, device=device)


def architectures() -> Iterator[Architecture]:
    """Yield all architectures with batch normalization, without building them."""
    for name in torchvision.models.list_models(module=torchvision.models):
        if name in TOO_LARGE:
            continue
        if not name.startswith(WITHOUT_BATCH_NORM) or name.endswith("_bn"):
            yield Architecture(name, name.split("_")[0].rstrip("0123456789"), "torchvision")
    yield from (Architecture(name, "segmentation", "torchvision") for name in SEGMENTATION)
    yield from (Architecture(name, "video", "torchvision") for name in VIDEO)
    for line in TIMM.strip().split("\n"):
        family, _, names = line.partition(": ")
        yield from (Architecture(name, family, "timm") for name in names.split())


def draw_norms(model: nn.Module) -> None:
    """Draw the parameters and statistics of all normalization layers: defaults hide mistakes, zeros most of all."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in (
                (module.weight, 0.8, 1.2),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.8, 1.2),
            ):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, high)
