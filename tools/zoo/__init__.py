"""The model zoo: real autoencoders and diffusion transformers, narrow (`tiny`) or as published (`full`), with inputs.

`load("wan2.1")` gives a `Case`: a model, inputs and one deterministic call. A new autoencoder is one `Entry` in
`video.py` or `image.py`, a new transformer one `TransformerEntry` in `video_transformers.py`, in
`packed_transformers.py` (pictures as tokens) or in `image_transformers.py`.
"""

from pvae.tools.zoo.case import Case
from pvae.tools.zoo.entry import Unsupported
from pvae.tools.zoo.load import load, names, parts

__all__ = ["Case", "Unsupported", "load", "names", "parts"]
