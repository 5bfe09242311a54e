"""The architecture of sam-tiny: SAM in small, through transformers' own configuration classes."""

from transformers import SamConfig

INPUT_SIZE = 384
PATCH_SIZE = 16
CHANNELS = 128
LAYER_NORM_EPS = 1e-5  # of the two-way transformer: the original's; transformers would take 1e-6


def sam_tiny_config(input_size: int = INPUT_SIZE) -> SamConfig:
    """Return the configuration for square inputs of `input_size` pixels, a multiple of 128 (8 x 8 windows of patches).

    The committed weights are for `INPUT_SIZE` alone: the absolute positions have one row per patch.
    """
    return SamConfig(
        vision_config={
            "image_size": input_size,
            "patch_size": PATCH_SIZE,
            "hidden_size": 192,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "mlp_ratio": 4.0,
            "output_channels": CHANNELS,
            "num_pos_feats": CHANNELS // 2,
            "window_size": 8,
            "global_attn_indexes": [2, 5, 7],
        },
        prompt_encoder_config={"hidden_size": CHANNELS, "image_size": input_size, "patch_size": PATCH_SIZE},
        mask_decoder_config={
            "hidden_size": CHANNELS,
            "mlp_dim": 512,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": CHANNELS,
            "layer_norm_eps": LAYER_NORM_EPS,
        },
    )
