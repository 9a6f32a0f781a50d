"""The zoo's video transformers. `full` has the published widths, `tiny` the same blocks with few channels."""

from pvae.tools.zoo.transformer import TransformerEntry

VIDEO_TRANSFORMERS: dict[str, TransformerEntry] = {}
