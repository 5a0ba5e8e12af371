"""Declares the two torchvision operators that its CUDA wheel cannot register beside a torch for CPU.

`import torchvision` fails without them. No image is ever looked at.
"""

import torch

if torch.version.cuda is None:
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
