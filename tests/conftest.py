"""One torch thread: the models of the tests are tiny, and threads only wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
