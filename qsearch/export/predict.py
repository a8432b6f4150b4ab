"""Classify pictures with the bundle that this file lies in: NumPy, Pillow and TVM's runtime are all it needs.

    python predict.py PICTURE...        files that Pillow reads; resized and cropped as preprocessing.json says
    python predict.py X.npy             images as the module takes them, see manifest.json

Output is one JSON document: per image its best classes. A picture of another colour mode is converted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def pixels_of(path, preprocessing):
    """A picture's pixels after resizing its short side and cropping its centre, uint8 (H, W, C)."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert({1: "L", 3: "RGB"}[preprocessing["channels"]])
    width, height = image.size
    if side := preprocessing["resize"]:
        longer = int(side * max(width, height) / min(width, height))
        width, height = (side, longer) if width <= height else (longer, side)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling[preprocessing["interpolation"].upper()])
    crop_height, crop_width = preprocessing["crop"]
    if width < crop_width or height < crop_height:
        raise ValueError(f"the picture has {width}x{height} pixels after resizing, the module needs {crop_width}x{crop_height}")
    left, top = round((width - crop_width) / 2.0), round((height - crop_height) / 2.0)
    cropped = image.crop((left, top, left + crop_width, top + crop_height))
    return np.asarray(cropped, np.uint8).reshape(crop_height, crop_width, preprocessing["channels"])


def main(arguments):
    """Entry point."""
    # The runner beside this file.
    import run

    bundle = Path(__file__).parent
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        if arguments[0].endswith(".npy"):
            images = np.load(arguments[0], allow_pickle=False)
        else:
            preprocessing = json.loads((bundle / "preprocessing.json").read_text(encoding="utf-8"))
            images = np.stack([pixels_of(path, preprocessing) for path in arguments])
            if not run.takes_pixels(run.read_manifest(bundle)):
                images = run.normalised(images, preprocessing)
        print(json.dumps(run.predict(bundle, images)))
    except run.BundleProblem as problem:
        print(f"problem: {problem}", file=sys.stderr)
        return problem.status
    # What Pillow and NumPy raise on files that they cannot read.
    except (OSError, ValueError, SyntaxError) as error:
        print(f"problem: {' '.join(arguments)}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # TVM's bindings load torch where that is installed: it takes seconds, and nothing here needs it.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    sys.exit(main(sys.argv[1:]))
