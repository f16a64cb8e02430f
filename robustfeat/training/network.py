"""The network that is trained: images to logits, and to features once its classifier is removed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, ResNet

from robustfeat.errors import InputError, first_line

__all__ = [
    "PROJECTION",
    "FirstConv",
    "Outputs",
    "StepOutput",
    "build_network",
    "classifier_of",
    "feature_network",
    "feature_size",
    "make_timm",
    "pooled_features",
    "projection_head",
    "require_side",
    "timm_settings",
]


class StepOutput(NamedTuple):
    """A network's outputs for the images of a step.

    Attributes:
        logits: (n, C).
        features: (n, D), what an exported model gives. The classifier and the heads see them, or their projection.
        heads: by name, what the heads of an objective make of that.
    """

    logits: Tensor
    features: Tensor
    heads: dict[str, Tensor]


class ResNet18(ResNet):  # type: ignore[misc]
    """ResNet-18 with torchvision's parameter names (timm's are the same) and a faster gradient of its images.

    Args:
        classes: C.
        width: channels of the first stage, 64 in the original; the last stage, and the features, have 8 times as many.
    """

    def __init__(self, classes: int, width: int = 64) -> None:
        self._width = width
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=classes)
        first = FirstConv(width)
        if width == 64:
            drawn: Any = self.get_submodule("conv1")
            first.weight = drawn.weight
        else:
            nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
            self.bn1 = nn.BatchNorm2d(width)
            self.fc = nn.Linear(8 * width, classes)
        self.conv1 = first

    def _make_layer(self, block: Any, planes: int, *rest: Any, **more: Any) -> nn.Sequential:
        """One of the four stages; torchvision's constructor calls it for each, with the original's channels."""
        if planes == 64:
            self.inplanes = self._width
        stage: nn.Sequential = super()._make_layer(block, planes * self._width // 64, *rest, **more)
        return stage

    def pooled(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) to (n, 8 * width), the features before the classifier."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) to (n, classes)."""
        logits: Tensor = self.fc(self.pooled(images))
        return logits


class Outputs(nn.Module):
    """Gives logits, features and what heads make of them in one call, as data parallelism and compilation need it.

    Args:
        network: a network from `build_network`.
        heads: modules from (n, D) features; an objective's own, and `PROJECTION`, which comes before the others.
    """

    def __init__(self, network: nn.Module, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.network, self.heads = network, heads

    def forward(self, images: Tensor) -> StepOutput:
        """(n, 3, H, W) to the three."""
        features = pooled_features(self.network, images)
        seen = self.heads[PROJECTION](features) if PROJECTION in self.heads else features
        logits = classifier_of(self.network)(seen)
        own = {name: head(seen) for name, head in self.heads.items() if name != PROJECTION}
        return StepOutput(logits, features, own)

    def logits(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) to (n, C), by `classifying` only."""
        logits: Tensor
        if PROJECTION not in self.heads:
            logits = self.network(images)
        else:
            logits = classifier_of(self.network)(self.heads[PROJECTION](pooled_features(self.network, images)))
        return logits

    @property
    def classifying(self) -> nn.ModuleList:
        """The modules between images and logits: the network, and the projection if there is one."""
        return nn.ModuleList([self.network, *(head for name, head in self.heads.items() if name == PROJECTION)])


PROJECTION = "_projection"
"""The head between the features and all that is learned from them: see `projection_head`."""


def projection_head(size: int, hidden: int) -> nn.Module:
    """An MLP from (n, size) features to (n, size) that training throws away, so that features stay more general.

    Source: SL-MLP (Wang et al., CVPR 2022) puts one before the classifier of supervised training, as SimCLR (Chen et
    al., ICML 2020) does before its loss; t-ReX (Sariyildiz et al., ICLR 2023) calls it expendable.
    """
    return nn.Sequential(
        nn.Linear(size, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, size)
    )


def build_network(classes: int, name: str = "resnet18", *, width: int = 64, image_size: int = 224) -> nn.Module:
    """A randomly initialised network from images to logits.

    Args:
        classes: C.
        name: `resnet18`, or `timm:NAME` for any classifier of timm.
        width: width of ResNet-18; see `ResNet18`.
        image_size: side of the validation images, for networks of a fixed size.

    Raises:
        InputError: timm has no such network, or it cannot be trained here.
    """
    if name == "resnet18":
        return ResNet18(classes, width)
    network = _create_timm(name.removeprefix("timm:"), classes, image_size)
    _require_classifier(network, name, image_size)
    return network


def _create_timm(name: str, classes: int, image_size: int) -> nn.Module:
    if ":" in name or "/" in name:  # timm would follow it
        raise InputError("is an address, not a network that timm has itself", argument="network", value=f"timm:{name}")
    try:
        return make_timm(name, image_size, num_classes=classes)
    except Exception as exc:  # networks check their arguments in ways of their own
        raise InputError(f"timm cannot make it ({first_line(exc)})", argument="network", value=f"timm:{name}") from exc


def make_timm(name: str, image_size: int | None = None, **options: Any) -> nn.Module:
    """A network of timm, for this side of its input where it takes no other; its settings then say so.

    Raises:
        Exception: timm cannot build the network. It raises many kinds.
    """
    import timm

    made: Any = None
    if image_size is not None:
        try:
            made = timm.create_model(name, img_size=(image_size, image_size), **options)
            made.pretrained_cfg["fixed_input_size"] = True
        except TypeError:  # convolutions take any size, and no such argument
            made = None
    if made is None:
        made = timm.create_model(name, **options)
    network: nn.Module = made
    return network


def _require_classifier(network: nn.Module, name: str, image_size: int) -> None:
    """The classifier applied to the pooled features gives the network's own logits.

    Raises:
        InputError: it does not, as with several classifiers, or the features are no vectors.
    """
    was_training, reason = network.training, None
    images = torch.linspace(-1, 1, 2 * 3 * image_size**2).view(2, 3, image_size, image_size)
    try:
        with torch.no_grad():
            network.eval()
            features = pooled_features(network, images)
            classifier = classifier_of(network)
            if not isinstance(classifier, nn.Linear):
                reason = f"its classifier is no linear layer, but {type(classifier).__name__}"
            elif features.ndim != 2:
                reason = f"it gives features of shape {tuple(features.shape[1:])}, not a vector"
            elif not torch.allclose(classifier(features), network(images), rtol=1e-4, atol=1e-5):
                reason = "its classifier does not see its features alone"
    except Exception as exc:  # networks fail in ways of their own
        reason = f"it fails on images of {image_size} px ({first_line(exc)})"
    finally:
        network.train(was_training)
    if reason:
        raise InputError(f"cannot be trained: {reason}", argument="network", value=name)


def require_side(network: nn.Module, name: str, side: int) -> None:
    """Images of this side can be trained on: some networks have a size of their own, or a least one.

    Args:
        network: a network from `build_network`, on its device.
        name: see `build_network`.
        side: S.

    Raises:
        InputError: they cannot.
    """
    if isinstance(network, ResNet18):  # takes all sides
        return
    was_training = network.training
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            pooled_features(network.eval(), torch.zeros(2, 3, side, side, device=device))
    except Exception as exc:  # networks fail in ways of their own
        raise InputError(
            f"fails on images of {side} px ({first_line(exc)})",
            argument="network",
            value=name,
            fix="pass other `image_sizes`; with `inner=half` it sees half of each side, too",
        ) from exc
    finally:
        network.train(was_training)


def batch_norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers with statistics of batches."""
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def pooled_features(network: nn.Module, images: Tensor) -> Tensor:
    """(n, 3, H, W) to (n, D), what the classifier sees."""
    if isinstance(network, ResNet18):
        return network.pooled(images)
    timm_network: Any = network
    pooled: Tensor = timm_network.forward_head(timm_network.forward_features(images), pre_logits=True)
    return pooled


def classifier_of(network: nn.Module) -> nn.Module:
    """The layer from features to logits."""
    any_network: Any = network
    classifier: nn.Module = any_network.fc if isinstance(network, ResNet18) else any_network.get_classifier()
    return classifier


def feature_size(network: nn.Module) -> int:
    """D, the length of the vectors that the classifier sees."""
    classifier = classifier_of(network)
    assert isinstance(classifier, nn.Linear)
    return classifier.in_features


def timm_settings(network: nn.Module) -> dict[str, Any]:
    """Facts of timm about a network, by the names of `ModelConfig`: architecture, first and last layers, and size."""
    if isinstance(network, ResNet18):
        name = "resnet18" if network.bn1.num_features == 64 else f"robustfeat:resnet18-width{network.bn1.num_features}"
        return {"architecture": name, "first_conv": "conv1", "classifier": "fc"}
    about: Any = network.pretrained_cfg
    layers = {name: about.get(name) for name in ("first_conv", "classifier")}
    fixed = bool(about.get("fixed_input_size"))
    return {"architecture": about["architecture"], **layers, "fixed_input_size": fixed}


def feature_network(network: nn.Module) -> nn.Module:
    """Removes the classifier, so the network outputs features."""
    any_network: Any = network
    if isinstance(network, ResNet18):
        any_network.fc = nn.Identity()
    else:
        any_network.reset_classifier(0)
    return network


class FirstConv(nn.Conv2d):
    """ResNet's first layer, 7 x 7 with stride 2, with a faster gradient with regard to the images on a CPU.

    No ordinary training asks for that gradient; HRRL does at each step, and three output channels are slow to compute:
    42 ms of 600 for 256 images of 64 px in bf16. The same sum, written as a convolution with stride 1 to twelve
    channels, one for each colour and each of the four positions that a stride of 2 tells apart, is 2.3 times as fast.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__(3, channels, kernel_size=7, stride=2, padding=3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(m, 3, H, W) to (m, channels, H / 2, W / 2), rounded up."""
        if images.device.type != "cpu" or not (torch.is_grad_enabled() and images.requires_grad):
            return super().forward(images)
        output: Tensor = _ImageGradient.apply(super().forward(images.detach()), images, self.weight)
        return output


class _ImageGradient(torch.autograd.Function):
    """Passes the layer's output on, and its gradient both to it (for the weights) and, convolved, to the images."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, images: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.height, ctx.width, ctx.dtype = *images.shape[2:], images.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        # Image row 2 i + a meets output row i - 1 + u through the kernel's row a + 5 - 2 u, u = 0 to 3; columns alike.
        parts = functional.pad(weight.to(gradient.dtype), (1, 0, 1, 0)).view(-1, 3, 4, 2, 4, 2)
        kernel = parts.flip(2, 4).permute(1, 3, 5, 0, 2, 4).reshape(12, len(weight), 4, 4)
        shifted = functional.conv2d(gradient, kernel.contiguous(memory_format=torch.channels_last), padding=2)
        images = functional.pixel_shuffle(shifted[:, :, 1:, 1:], 2)
        return gradient, images[:, :, : ctx.height, : ctx.width].to(ctx.dtype), None
