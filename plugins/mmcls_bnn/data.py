"""Image folders that are checked before a run, and colours of the light."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import FUNCTIONS
from PIL import Image

from lskd import LskdError
from lskd.base.images import EXTENSIONS, check_images, class_folders, class_images, unsuited
from lskd.errors import one_line
from mmcls_bnn.compat import DATASETS, TRANSFORMS, CustomDataset

# Of ImageNet's pixels in red, green and blue from 0 to 255 (Krizhevsky et al., 2012, Sec. 4.1).
_EIGENVALUES = np.array([55.4625, 4.7940, 1.1475])
_EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


@DATASETS.register_module()
class CheckedImageFolder(CustomDataset):
    """mmcls' CustomDataset on image folders, `<data_root>/<data_prefix>/<class>/`, with one-line errors.

    Args:
        num_classes: how many class folders there must be.
        hint: what to do where the folder is missing; it ends the message.

    The images are those that timm's reader takes: hidden files and the like are passed over.

    Raises:
        LskdError: for a folder that does not exist, has a class without images or images that cannot be
            read, or has another number of classes.
    """

    def __init__(
        self, data_root: str, data_prefix: str, num_classes: int, hint: str = "", **kwargs: Any
    ) -> None:
        folder = Path(data_root, data_prefix).expanduser()
        if not folder.is_dir():
            raise LskdError(f"data folder {folder} does not exist; {hint or 'set data_root in the recipe'}")
        classes = len(class_folders(folder))
        if classes != num_classes:
            raise LskdError(
                f"data folder {folder} has {classes} class folders, the recipe {num_classes} classes; "
                "set num_classes, or point data_root elsewhere."
            )
        super().__init__(data_root=data_root, data_prefix=data_prefix, **kwargs)

    def _find_samples(self) -> list[tuple[str, int]]:
        """Return the name and the class of each image; mmcls lists whatever lies in the folders."""
        root = Path(self.img_prefix)
        names = class_folders(root)
        images = {name: class_images(root / name)[0] for name in names}
        empty = [name for name in names if not images[name]]
        if empty:
            raise LskdError(
                f"class folder {root / empty[0]} has no images ({', '.join(sorted(EXTENSIONS))}); "
                "put them there."
            )
        check_images([root / name / image for name in names for image in images[name]])
        self._metainfo.setdefault("classes", tuple(names))
        self.folder_to_idx = {name: number for number, name in enumerate(names)}
        return [(f"{name}/{image}", number) for number, name in enumerate(names) for image in images[name]]

    def prepare_data(self, idx: int) -> Any:
        """Return a sample through the pipeline.

        Raises:
            LskdError: an image that is none in 8 bits, or has gone or changed since the check at the start.
        """
        path = self.get_data_info(idx)["img_path"]
        try:
            with Image.open(path) as image:
                if problem := unsuited(image):
                    raise LskdError(f"image {path} {problem}")
        except OSError as error:
            raise LskdError(f"image {path} cannot be read ({one_line(error)}); repair or remove it") from None
        return super().prepare_data(idx)


def name_of(data_root: str | None, info: Mapping[str, Any]) -> str | None:
    """Return an image's file relative to the data's root; None: it lies in no file of its own.

    Args:
        info: what the data set knows of the image, `get_data_info`.
    """
    if info.get("img_path") is None:
        return None
    path, root = Path(info["img_path"]), Path(data_root or "")
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


@TRANSFORMS.register_module()
class PcaLighting:
    """Add to all pixels of an image one random colour along ImageNet's principal components, within 0 to 255.

    The image stays blue first, as mmcls loads it. (mmcls' own Lighting turns it round with `to_rgb=True`,
    which its preprocessor then does again, and lets values above 255 start again from 0.)
    Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", 2012.

    Args:
        std: deviation of the three weights of the components.

    Raises:
        LskdError: for images without three channels.
    """

    def __init__(self, std: float = 0.1) -> None:
        self.std = std

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Change 'img', `(H, W, 3)` uint8."""
        image = results["img"]
        if image.shape[2:] != (3,):
            raise LskdError(f"PcaLighting needs images of 3 channels, not {image.shape[2:]}; take it out.")
        colour = _EIGENVECTORS @ (_EIGENVALUES * np.random.normal(0, self.std, 3))
        results["img"] = np.clip(np.rint(image + colour[::-1]), 0, 255).astype(np.uint8)
        return results

    def __repr__(self) -> str:
        """Show the deviation."""
        return f"PcaLighting(std={self.std})"


@FUNCTIONS.register_module()
def seed_worker(worker_id: int) -> None:
    """Seed a loading process from torch's seed of this epoch, for augmentation that a resumed run repeats."""
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)
