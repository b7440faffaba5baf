"""Images as tasks: encoded bytes in Parquet, decoded pixels in a memory-mapped cache, protocols for streams."""

from treelora.data.images.decode import ImageProblem, decode
from treelora.data.images.files import ImageExample, read_images, write_images
from treelora.data.images.pixels import ImageRows, pixel_rows

__all__ = ["ImageExample", "ImageProblem", "ImageRows", "decode", "pixel_rows", "read_images", "write_images"]
