"""The architecture of sam-tiny: SAM in small, through transformers' own configuration classes."""

from transformers import SamConfig

INPUT_SIZE = 512
CHANNELS = 128


def sam_tiny_config(input_size: int = INPUT_SIZE) -> SamConfig:
    """Return the configuration; `input_size` may be smaller while training (it must be a multiple of 128)."""
    return SamConfig(
        vision_config={
            "image_size": input_size,
            "patch_size": 16,
            "hidden_size": 192,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "mlp_ratio": 4.0,
            "output_channels": CHANNELS,
            "num_pos_feats": CHANNELS // 2,
            "window_size": 8,
            "global_attn_indexes": [3, 7],
        },
        prompt_encoder_config={"hidden_size": CHANNELS, "image_size": input_size, "patch_size": 16},
        mask_decoder_config={
            "hidden_size": CHANNELS,
            "mlp_dim": 512,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": CHANNELS,
        },
    )
