"""AnatPaste as published, re-derived from its description (Sato et al., iScience 2023): one image at a time, on the CPU,
lengths in pixels of a 256 x 256 picture of three channels. The other side of `pasting.py` and an arm of the anomaly tables;
carina uses nothing of it.

The published color jitter changes brightness, contrast, saturation and hue; the last two do nothing to a gray picture, but
they are part of what a user of it runs, and of its time.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from skimage.exposure import equalize_adapthist
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops
from skimage.morphology import dilation, footprint_rectangle, opening
from skimage.segmentation import clear_border
from torchvision.transforms import functional as color

SIDE = 256
AREA, ASPECT = (0.02, 0.15), (0.3, 1 / 0.3)
MARGIN, OPACITY, BLUR = 10, (150, 255), (0, 15)  # pixels, of 255, pixels; half open
JITTER = 0.1
SMALLEST = 400  # pixels of a component of the mask
SQUARE = footprint_rectangle((3, 3))


def published_mask(image: np.ndarray) -> np.ndarray:
    """(256, 256) bool, the lungs of an image (256, 256) in [0, 1]; possibly none.

    Adaptive equalization, the dark side of Otsu's threshold, opening, nothing that touches the frame, dilation; a component
    that is too small is removed by blanking its bounding box, with whatever else lies in it.
    """
    equal = equalize_adapthist(image, clip_limit=0.01, nbins=256)
    mask = dilation(clear_border(opening(equal < threshold_otsu(equal, nbins=256), SQUARE)), SQUARE)
    for region in regionprops(label(mask)):
        if region.area < SMALLEST:
            mask[region.slice] = False
    return mask


def jittered(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, each times U(0.9, 1.1), and hue plus U(-0.1, 0.1) of the circle."""
    for adjust in (color.adjust_brightness, color.adjust_contrast, color.adjust_saturation):
        picture = adjust(picture, rng.uniform(1 - JITTER, 1 + JITTER))
    return color.adjust_hue(picture, rng.uniform(-JITTER, JITTER))


def published(
    image: np.ndarray, rng: np.random.Generator, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Jitter an image (256, 256) in [0, 1] as a whole, then paste one patch of it into its lungs.

    mask: (256, 256) bool (default: `published_mask`; where it is empty the image is only jittered). Returns the image,
    float32 in [0, 1] in steps of 1/255, and the mask.
    """
    if image.shape != (SIDE, SIDE):
        raise ValueError(f"the published lengths are pixels of {SIDE} x {SIDE}, not of {image.shape}")
    mask = published_mask(image) if mask is None else mask
    whole = jittered(Image.fromarray(np.round(image * 255).astype(np.uint8)).convert("RGB"), rng)
    pasted = np.asarray(_pasted(whole, mask, rng), dtype=np.float32) / 255
    return pasted[..., 0], mask


def _pasted(whole: Image.Image, mask: np.ndarray, rng: np.random.Generator) -> Image.Image:
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return whole
    area = rng.uniform(*AREA) * SIDE * SIDE
    ratio = math.exp(rng.uniform(*np.log(ASPECT)))
    width, height = (min(SIDE, round(math.sqrt(part))) for part in (area / ratio, area * ratio))
    left, top = rng.integers(0, SIDE - width + 1), rng.integers(0, SIDE - height + 1)
    patch = jittered(whole.crop((left, top, left + width, top + height)), rng)
    at = rng.integers(len(rows))
    corner = int(columns[at] - width // 2), int(rows[at] - height // 2)

    blend = Image.new("L", (width, height), 0)
    box = (MARGIN, MARGIN, width - MARGIN, height - MARGIN)
    if box[2] > box[0] and box[3] > box[1]:  # else the margins have eaten the shape
        draw = ImageDraw.Draw(blend)
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=int(rng.integers(*OPACITY)))
    blend = blend.filter(ImageFilter.GaussianBlur(int(rng.integers(*BLUR))))
    alpha, pasted = Image.new("L", whole.size, 0), whole.copy()
    alpha.paste(blend, corner)
    pasted.paste(patch, corner)
    return Image.composite(pasted, whole, ImageChops.multiply(alpha, Image.fromarray(mask.astype(np.uint8) * 255)))
