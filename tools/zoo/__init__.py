"""The model zoo: real autoencoders, narrow (`tiny`) or as published (`full`), ready to encode and to decode.

`load("wan2.1")` gives a `Case`: a model, inputs and one deterministic call. A new model is one `Entry` in `video.py` or
`image.py`.
"""

from pvae.tools.zoo.case import Case
from pvae.tools.zoo.entry import Unsupported
from pvae.tools.zoo.load import load, names

__all__ = ["Case", "Unsupported", "load", "names"]
