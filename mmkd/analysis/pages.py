"""Self-contained HTML pages from Jinja templates."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np


def render_page(template: Path, **values: Any) -> str:
    """Fill a template, which escapes what it is given; a name that it is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters['number'] = lambda value, form='.1f': format(value, form)
    return environment.get_template(template.name).render(**values)


def jpeg_uri(image: np.ndarray, longest: int) -> str:
    """An image (H, W, 3), BGR, scaled down to ``longest`` pixels on its longer side, as a URI."""
    height, width = image.shape[:2]
    scale = longest / max(height, width)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()
    return 'data:image/jpeg;base64,' + base64.b64encode(encoded).decode()
