"""The architectures this project exports, as data. Standard library only."""

from dataclasses import dataclass

from service.tensors import PATCH_SIZE, Geometry

# The original's LayerNorm epsilons (segment-anything 1.0): 1e-6 in the image encoder and in every LayerNorm2d,
# PyTorch's default 1e-5 in the two-way transformer, where transformers' `SamMaskDecoder` uses 1e-6.
ENCODER_EPS = 1e-6
CHANNELS_EPS = 1e-6
TRANSFORMER_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Architecture:
    """One member of the SAM family.

    Attributes:
        input_size: side S of the square input, pixels.
        width, depth, heads: of the vision transformer.
        window: side of a window, patches; blocks in `global_blocks` attend over the whole grid instead.
        channels: C, of the embedding and of the decoder.
        decoder_heads, decoder_mlp, iou_hidden: of the two-way transformer and the IoU head.
    """

    input_size: int
    width: int
    depth: int
    heads: int
    window: int
    global_blocks: tuple[int, ...]
    channels: int = 256
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    iou_hidden: int = 256

    @property
    def grid(self) -> int:
        """Side of the patch grid, G."""
        return self.input_size // PATCH_SIZE

    @property
    def geometry(self) -> Geometry:
        """What the tensors' shapes depend on."""
        return Geometry(self.input_size, self.grid, self.channels)


SAM_TINY = Architecture(
    input_size=384,
    width=192,
    depth=8,
    heads=6,
    window=8,
    global_blocks=(2, 5, 7),
    channels=128,
    decoder_heads=4,
    decoder_mlp=512,
    iou_hidden=128,
)
SAM_VIT_B = Architecture(1024, width=768, depth=12, heads=12, window=14, global_blocks=(2, 5, 8, 11))
SAM_VIT_L = Architecture(1024, width=1024, depth=24, heads=16, window=14, global_blocks=(5, 11, 17, 23))
SAM_VIT_H = Architecture(1024, width=1280, depth=32, heads=16, window=14, global_blocks=(7, 15, 23, 31))
