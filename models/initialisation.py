"""Initial weights under which an image still shows in the latent, and the latent in the prediction.

PyTorch's defaults shrink a signal by sqrt(3) in every layer without normalisation. The encoder has about ten of them
between the image and z, so that z would hardly depend on the image (on windows of photographs its standard deviation
would be 0.003), and what depends on z would be learnt late.
"""

from torch import nn


def preserve_variance(network):
    """Draw the weights of all Linear and convolution layers anew: normal, of variance 1 / fan-in, and zero biases.

    Layers of zeros, the ends of the residual branches, stay so; other parameters keep the values that they have.
    """
    for layer in network.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) or layer.weight.is_meta:
            continue
        if layer.weight.any():
            nn.init.normal_(layer.weight, std=_fan_in(layer) ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _fan_in(layer):
    """How many products are summed in one output."""
    if isinstance(layer, nn.ConvTranspose2d):  # an output sees a part of the kernel, one of stride² phases
        return layer.weight[:, 0].numel() / (layer.stride[0] * layer.stride[1])
    return layer.weight[0].numel()
