"""What the decoded caches save and cost, as ratios within one run, and how far their crops are from exact.

python benchmarks/decoding.py [--size PIXELS] [--images COUNT]
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timing import seconds
from torchvision import transforms

from taskvec.core.progress import no_progress
from taskvec.data.augment import crop_box, cut
from taskvec.data.decoding import read_whole, write_views, write_whole
from taskvec.data.images import Preprocessing, open_image, resize_and_crop, shrink


def write_photos(folder: Path, count: int) -> list[Path]:
    """Write crops of scikit-learn's two photographs (427 x 640) as JPEG files, each another part."""
    photos, generator = load_sample_images().images, np.random.default_rng(0)
    for index in range(count):
        photo = photos[index % len(photos)]
        top, left = generator.integers(0, 60), generator.integers(0, 100)
        part = photo[top : top + 367, left : left + 540]
        Image.fromarray(part).save(folder / f"{index:04}.jpg", quality=95)
    return sorted(folder.iterdir())


def difference(photos: list[Path], to: Preprocessing) -> tuple[float, float]:
    """Return by how many levels of 255 crops of kept and of original images differ: mean and 99th percentile."""
    found = []
    for index, path in enumerate(photos):
        image = np.asarray(open_image(path)).transpose(2, 0, 1)
        kept = shrink(Image.fromarray(image.transpose(1, 2, 0)), to)
        box = crop_box(kept.shape[1], kept.shape[2], np.random.default_rng(index))
        scale = image.shape[1] / kept.shape[1]
        top, left, high, wide = (value * scale for value in box)
        edges = (left, top, left + wide, top + high)
        exact = Image.fromarray(image.transpose(1, 2, 0)).resize((to.size, to.size), Image.Resampling.BICUBIC, edges)
        found.append(np.abs(cut(kept, box, to.size).astype(int) - np.asarray(exact).transpose(2, 0, 1)))
    levels = np.stack(found)
    return float(levels.mean()), float(np.percentile(levels, 99))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=96)
    options = parser.parse_args()
    torch.set_num_threads(1)
    to = Preprocessing(options.size, 0.9)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(1) as pool:
        folder = Path(temporary)
        for name in ("photos", "whole"):
            (folder / name).mkdir()
        photos = write_photos(folder / "photos", options.images)
        uncached = seconds(lambda: [resize_and_crop(open_image(path), to) for path in photos])
        build = seconds(lambda: write_views(photos, to, folder / "views.npy", False, no_progress))
        write_whole(photos, to, folder / "whole", False, no_progress)
        views, whole = np.load(folder / "views.npy", mmap_mode="r"), read_whole(folder / "whole")
        cached = seconds(lambda: [np.array(views[start : start + 32]) for start in range(0, len(views), 32)])
        crop = transforms.RandomResizedCrop(options.size, (0.9, 1.0), interpolation=Image.Resampling.BICUBIC)
        exact = seconds(lambda: [np.asarray(crop(open_image(path))) for path in photos])
        kept = seconds(lambda: whole.crops(range(len(photos)), 0, 0, options.size, pool))
        mean, most = difference(photos, to)
    print(f"photographs of 540 x 367 as JPEG, {options.size} px, {options.images} images, CPU seconds")
    print(f"{'decoding each time, over reading the evaluation cache':70} {uncached / cached:8.1f}")
    print(f"{'building the evaluation cache, over decoding once':70} {build / uncached:8.2f}")
    print(f"{'decoding and cropping each time, over crops of kept whole images':70} {exact / kept:8.2f}")
    print(f"{'crops of kept images against the originals, mean difference in levels':70} {mean:8.2f}")
    print(f"{'the same, 99th percentile':70} {most:8.2f}")


if __name__ == "__main__":
    main()
